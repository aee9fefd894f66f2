"""A whole swarm on a virtual clock: the real decisions, over links and machines that are only reckoned."""
