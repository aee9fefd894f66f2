"""An OpenAI-compatible server in front of a swarm; only here FastAPI and its friends are imported.

engine      the port to the model that answers, and the swarm behind it
settings    what an operator decides
server      the listening socket, and an orderly end
app         the endpoints
desk        requests for completions, from what was asked to the reply
gate        who may come in, how often, and with how large a body; a request's id, its log line and its figures
keys        API keys and the file that holds their hashes
limits      how often and how much at once (pure)
requests    what clients may send
chat        a conversation as the model's own prompt
tools       tool calls: what the model is asked for, and what is read from its text
grammar     JSON schemas as constraints on tokens
answering   the answers to one request, as they come
replies     what clients get (pure)
errors      OpenAI's error object and its statuses
metrics     what Prometheus reads

The dashboard:
dashboard   its endpoints: the page, the state, the state as a stream
page        its files (in site/) and the headers that confine them
state       what it shows, as typed values
lookout     sees that once a moment for all who watch
solving     plan and shape, solved in a thread when the swarm has changed
running     answers under way, and which nodes they go through
"""
