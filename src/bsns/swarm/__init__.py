"""Who is here now: identities, the right to join, and what members announce about themselves.

identity             a node's Ed25519 key, and the peer id that contains its public half
invites              founding a swarm and inviting into it
membership           a node's own certificate, the judge of others', and the greeting that applies both
records              a node's card, signed and opened
directory            what a directory is, and one in memory for tests
hivemind_directory   the real one: a Kademlia DHT that serves members only
"""
