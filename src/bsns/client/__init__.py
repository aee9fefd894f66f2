"""Using blocks of others.

links       one stream to each node, and who is waiting for what on it
session     one session on a route: open, step, close
decoder     the thread that turns activations into tokens and tokens into activations
generate    a prompt's way to a streamed answer
sampling    logits to a token, a pure function of seed and position
detokenize  tokens to text, and stop strings
prompts     tokenizer and chat template
"""
