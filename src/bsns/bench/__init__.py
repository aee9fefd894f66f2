"""Measurements that a stranger can repeat: one file per `bsns bench` verb, and what some of them stand on.

emulation        a network of places on this machine, each a namespace
forwarder        the process that delays and paces its packets
layouts          chains of nodes under measurement: what is predicted of them, and what they did
settings         random swarms of unequal nodes and ways
pipes            the ceiling of a pipeline of processes
machine          the machine that is measured
llama_cpp        a build of llama.cpp, and how fast it is
llama_gguf       the models it is measured with
compress_rivals  others' codecs and quantised layers, where they are installed
load             chats through a gateway, while nodes are killed
table2           six nodes over three networks, and guesses
first_token      a long prompt over slow ways, in every codec
"""
