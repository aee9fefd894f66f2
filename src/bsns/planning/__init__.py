"""Who should hold which blocks. Pure: no I/O, no clocks, no torch.

planner       from a snapshot to a plan, from a chain problem to a chain with a proof
problem       the chain problem: blocks in a row, unequal nodes and links
network       all nodes and ways, without a table of all pairs
scale         which few of thousands of nodes are worth planning with
rival_rules   how others cut a model
chain_dp      the best cut for a given order of nodes
device_order  orders of nodes by a genetic search
exact         CP-SAT over chains and devices, with a proof
bounds        what no plan beats
replicas      several nodes for one range
reasons       why a node was left out, and what memory is missing
brkga         the genetic engine
schemas       plans made beforehand, looked up by likeness
schema_file   the file that holds them
likeness      by what one tells how alike two swarms are
transfer      a chain as roles, cast with the nodes of another swarm
joining  what a node takes that joins a swarm without an orchestrator
memory   how many blocks fit a node
walks    the cheapest way over blocks and nodes, and chains that use each node once
selection  nodes picked by a user's own weights, with a look ahead
"""
