"""Who is here now: identities, the right to join, and what members announce about themselves.

identity             a node's Ed25519 key, and the peer id that contains its public half
invites              founding a swarm and inviting into it
membership           a node's own certificate, the judge of others', and the greeting that applies both
envelopes            statements with their author's signature and certificate (pure)
records              a node's card, signed and opened
snapshot             the records of all nodes as one frozen view (pure)
probing              what a node knows of its ways to others, and whom it measures next (pure)
bandwidth            which probe is sent next, and what its time says (pure)
allowances           so much at once, so much a second; how many probes a node takes (pure)
doctor               what looks wrong in a swarm (pure)
election             who is the orchestrator: lots, a lease, its renewal (pure)
plans                an orchestrator's lease and plan, signed and opened; which plan is obeyed (pure)
proposals            what an orchestrator publishes, and whether it is worth a move (pure)
directory            what a directory is, and one in memory for tests
dht_guard            what closes hivemind's DHT to everybody but members
dht_traversal        hivemind's walk through the DHT, made to leave nothing waiting
hivemind_directory   the real one: a Kademlia DHT that serves members only
"""
