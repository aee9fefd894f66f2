"""Who should hold which blocks. Pure: no I/O, no clocks, no torch.

joining  what a node takes that joins a swarm without an orchestrator
memory   how many blocks fit a node
"""
