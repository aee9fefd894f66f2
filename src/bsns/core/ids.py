"""Ids as types, so that a peer cannot be passed where a session is meant."""

from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58; for Ed25519 identities it contains the public key itself."""

SessionId = NewType("SessionId", int)
"""63 random bits, drawn by the client that opens the session."""

SwarmId = NewType("SwarmId", str)
"""Hex fingerprint of the swarm's public key: a swarm is whoever holds that key's signature."""

ModelId = NewType("ModelId", str)
"""Fingerprint of a model's configuration and tensor index: two nodes with equal ids hold the same model."""
