"""One running peer: the only place where concrete classes are chosen and wired.

peer       transport, membership and directory of one process
server     a node that serves a range of blocks
prober     measures a node's ways to the others
snapshots  the swarm as one frozen view, with the ways of whoever looks
view       who is here now, and how far away
client     the public face for those who use a swarm
local      a whole swarm of processes on this machine
"""
