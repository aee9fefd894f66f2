"""One running peer: the only place where concrete classes are chosen and wired.

peer          transport, membership and directory of one process
server        a node that serves a range of blocks
ends          a model's two ends, for a client
executors     which executor computes a node's blocks, and why
capacity      what its machine has room for: device, dtype, range and cache
prober        measures a node's ways to the others
orchestrator  stands for the office, plans while it holds it, says which plan is in force
moving        brings what a node holds to what the plan in force says
observe       looks at a swarm without using it
snapshots     the swarm as one frozen view, with the ways of whoever looks
telemetry     spans of answers and stages, for OpenTelemetry
metrics       what Prometheus reads of a node
scraping      the address at which it does
view          who is here now, and how far away
wires         which codec activations take on each way of a client's routes
client        the public face for those who use a swarm
alone         a range of blocks in this process, computed as a node would
draft         a small model that guesses what a large one will say
trial         a short answer over the swarm as it is, beside what planning predicts
local         a whole swarm of processes on this machine
processes     processes of the `bsns` command, beside this one
zygote        the process from which they are forked, with its libraries loaded
leash         a process that must not outlive the one that started it
"""
