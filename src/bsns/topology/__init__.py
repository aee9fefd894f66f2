"""The shape of the network. Pure: no I/O, no clocks, no torch.

synthetic    random swarms of three shapes
"""
