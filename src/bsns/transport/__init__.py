"""Moving frames between peers.

port     what a transport is: dial, accept, and streams of frames
framing  frames off a byte stream, shared by both
libp2p   the real one, on hivemind's libp2p daemon
memory   for tests and the simulator: queues in one process
"""
