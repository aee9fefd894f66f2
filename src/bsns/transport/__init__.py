"""Moving frames between peers.

port     what a transport is: dial, accept, and streams of frames
framing  frames off a byte stream, shared by libp2p and memory
backlog  how much of what was sent the other end has not taken
direct   sealed TCP beside libp2p, for the path tokens take
sockets  the files of its daemon's sockets
libp2p   the real one, on hivemind's libp2p daemon
memory   for tests: queues in one process
"""
