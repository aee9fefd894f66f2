"""Who should hold which blocks. Pure: no I/O, no clocks, no torch.

joining  what a node takes that joins a swarm without an orchestrator
memory   how many blocks fit a node
walks    the cheapest way over blocks and nodes, and chains that use each node once
selection  nodes picked by a user's own weights, with a look ahead
"""
