"""Who should hold which blocks. Pure: no I/O, no clocks, no torch.

planner       from a snapshot to a plan, from a chain problem to a chain with a proof
problem       the chain problem: blocks in a row, unequal nodes and links
network       all nodes and ways, without a table of all pairs
scale         which few of thousands of nodes are worth planning with
rival_rules   how others cut a model
chain_dp      the best cut for a given order of nodes
device_order  orders of nodes by a genetic search
order_costs   what such orders cost, a population at once
path_search   the local search of device_order
exact         CP-SAT over chains and devices, with a proof
exact_blocks  blocks as variables of the exact solver
bounds        what no plan beats
replicas      several nodes for one range
sharing       the local search of replicas
account       a plan in words: its speed, its proof, its advice
reasons       why a node was left out, and what memory is missing
brkga         the genetic engine
weight_decoder  its plans whose keys are the weights of selection
schemas       plans made beforehand, looked up by likeness
schema_file   the file that holds them
likeness      by what one tells how alike two swarms are
transfer      a chain as roles, cast with the nodes of another swarm
layouts       what ranges held now are worth, and whether a plan is worth moving for
selection     nodes picked by a user's own weights, with a look ahead
weighed_rivals  what others' chains cost by such weights
joining       what a node takes that joins a swarm without an orchestrator
memory        how many blocks fit a node, and what a stage will take
walks         the cheapest way over blocks and nodes, and chains that use each node once

For models of any shape:
graph            operators, tensors between them, what parts cost, topological orders
graph_planner    from a graph and equal machines to a plan with a proof
graph_devices    the same for unequal devices and links
orders           the orders that people would write down
segments         what pieces of an order cost
slicing          the best cut of an order
refining         operators moved between the parts of a plan
graph_bounds     what no partition beats, and why
min_cuts         the least io of a part or of a prefix
prefix_bounds    which parts an operator can be in
prefixes         all prefixes of a narrow graph: the exact optimum
partition_model  small graphs as an integer program
"""
