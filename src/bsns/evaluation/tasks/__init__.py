"""What is asked of a model in each task, and what is made of its answers.

task         the port: what a task is
hellaswag    which ending fits
lambada      the last word of a passage
bigbench     multiple choice in BIG-bench's form
perplexity   plain English, window by window
"""
