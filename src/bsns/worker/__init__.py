"""Running blocks for others.

sessions         who may step where, and how much cache is promised (pure)
line             who waits for room in the cache, and in what order they get it (pure)
batching         which steps run together, and when (pure)
executor         the port: a batch in, activations out, the KV cache behind it
torch_executor   the model library's own layers, on any device
native_executor  our own kernels, on a CPU
coding           the wire's codecs around an executor
calibration      how fast a stage is, measured before it serves
throttle         another executor on a slower machine, for emulated swarms
faults           a worker that fails on demand, for tests and benchmarks of survival
journal          what a session has sent on, for a replay (pure)
replays          journals on their way to a new next stage, or along to a spare
relay            streams to the next stages
tracing          the port to whoever traces what a stage does for each session
tally            what it has done so far, in figures
speed            how fast a node is (pure)
clients          the streams of those whose sessions run here
service          the conversation with clients and neighbours
"""
