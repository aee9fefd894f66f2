"""Using blocks of others.

links       one stream to each node, and who is waiting for what on it
session     one session on a route: open, replace a stage, close
reader      whoever waits for what a session brings, and how far it has come
watch       asks the stages of a session whose step is overdue
fault       whose doing it is (pure)
repair      a lost stage is replaced, and only its blocks are computed again
spares      nodes that compute an answer's stages along, on request
finding     how stages are asked for, and what is told of them
pace        which stage has become slow (pure)
decoder     the thread that turns activations into tokens and tokens into activations
tracing     the port to whoever traces answers
tally       what a client has done so far, in figures
opening     sessions on the best route, in turn where there is no room
parking     an answer's session is kept, and taken up again
intake      what last stages bring back, checked
pieces      what a stream yields, and what an answer cost
generate    a prompt's way to a streamed answer
sampling    logits to a token, a pure function of seed and position
detokenize  tokens to text, and stop strings
speculation  guesses at the next tokens (pure)
kept        sessions that are kept for prompts that go on where they ended (pure)
prompts     tokenizer and chat template
"""
