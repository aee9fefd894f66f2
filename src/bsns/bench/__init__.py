"""Measurements that a stranger can repeat: one file per `bsns bench` verb, and what some of them stand on.

emulation        a network of places on this machine, each a namespace
forwarder        the process that delays and paces its packets
layouts          chains of nodes under measurement: what is predicted of them, and what they did
settings         random swarms of unequal nodes and ways
pipes            the ceiling of a pipeline of processes
machine          the machine that is measured
llama_cpp        a build of llama.cpp, and how fast it is
llama_gguf       the models it is measured with
llama_rpc        the same build over two of its servers
language_pipes   two nodes of another swarm, where it is installed
programs         others' programs, started and ended
spoken           models of random weights that can be spoken to
timed            how fast the tokens of several answers come
rivals           one model through ours and others' programs, in turns
compress_rivals  others' codecs and quantised layers, where they are installed
load             chats through a gateway, while nodes are killed
table2           six nodes over three networks, and guesses
first_token      a long prompt over slow ways, in every codec
"""
