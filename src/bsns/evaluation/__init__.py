"""How good a model is when a swarm computes it, and whether two ways of computing it are as good as each other.

asks         what is asked of a model: how likely a continuation is after a context
scoring      answers asks over a swarm, many at once
crew         many pieces of work at once, with an end
tasks        what is asked in each task, and what is made of the answers
registry     our own tasks by name
datafile     evaluation data that lie in installed packages
runner       takes a task to its end, item by item
journal      the items that are done, so that an interrupted run goes on where it was
results      what a run found, as a file
comparison   two runs side by side, item by item
harness      lm-evaluation-harness's tasks over the same scoring
"""
