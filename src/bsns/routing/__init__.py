"""Which chain of nodes a session walks. Pure: no I/O, no clocks, no torch.

chain      the chain that serves a wish best, with room for the session
widest     the exact searches: least latency, and the slowest stage as fast as may be
load       what open sessions slow down
grudges    peers that failed lately, passed over for a while
shortlist  of a large swarm's nodes those that are worth asking
"""
