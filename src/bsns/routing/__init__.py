"""Which chain of nodes a session walks. Pure: no I/O, no clocks, no torch.

chain  the fastest chain with room for the session
"""
