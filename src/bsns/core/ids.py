"""Ids as types, so that a peer cannot be passed where a session is meant; and peers as people tell them apart."""

from collections import Counter
from collections.abc import Iterable
from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58; for Ed25519 identities it contains the public key itself."""

SessionId = NewType("SessionId", int)
"""63 random bits, drawn by the client that opens the session."""

SwarmId = NewType("SwarmId", str)
"""Hex fingerprint of the swarm's public key: a swarm is whoever holds that key's signature."""

ModelId = NewType("ModelId", str)
"""Fingerprint of a model's configuration and tensor index: two nodes with equal ids hold the same model."""

SHORT_CHARACTERS = 8


def short(peer: PeerId, characters: int = SHORT_CHARACTERS) -> str:
    """The end of a peer id, by which people tell ids apart; a name that is hardly longer stays whole."""
    return f"…{peer[-characters:]}" if len(peer) > characters + 1 else peer


def short_names(peers: Iterable[PeerId]) -> dict[PeerId, str]:
    """How each peer of one listing is called: as `short` does, with as much more as tells it from the others."""
    names: dict[PeerId, str] = {}
    left, characters = sorted(set(peers)), SHORT_CHARACTERS
    while left:
        ends = Counter(peer[-characters:] for peer in left)
        names |= {
            peer: short(peer, characters)
            for peer in left
            if ends[peer[-characters:]] == 1 or len(peer) <= characters + 1
        }
        left = [peer for peer in left if peer not in names]
        characters += 1
    return names
