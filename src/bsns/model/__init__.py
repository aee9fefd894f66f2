"""Loading and cutting models.

source         what a user calls a model, as a directory on this disk
gguf           GGUF files converted to such a directory, once
failures       what libraries and the system raise, as typed errors
checkpoint     what the headers of a checkpoint say (without torch)
configuration  what config.json says, as the model library reads it
shapes         what planning has to know of a model
families       where a family keeps its parts, for the few that differ
stage          a range of blocks, run by the library's own layers
ends           embedding, last norm and head, which stay with the client
attention      ragged attention over the sessions' KV slabs
linear         prepacked linear layers for CPUs
quantized      linear layers in int8 and int4
memory         memory that was freed goes back to the system
tensors        between torch tensors and a frame's bytes
"""
