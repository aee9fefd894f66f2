"""Invites, and the certificates made from them.

The founder of a swarm draws an Ed25519 key pair (RFC 8032): the *swarm key*. An invite carries a second key pair, the
*invite key*, whose public half and expiry the swarm key has signed. Whoever holds the invite signs its own peer id with
the invite key; both signatures together are its certificate. A certificate is useless to anybody else, because libp2p
proves the peer id of every stream.
"""

from __future__ import annotations

import msgspec


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """All a newcomer needs: whom to ask, which swarm it is, and the right to join it until `expires_s` (Unix time)."""

    version: int
    swarm_key: bytes
    open: bool
    expires_s: float
    invite_seed: bytes
    signature: bytes
    bootstrap: tuple[str, ...]


class Certificate(msgspec.Struct, frozen=True, array_like=True):
    """The swarm key vouches for the invite key, and the invite key for one peer id; both until `expires_s`."""

    invite_key: bytes
    expires_s: float
    invite_signature: bytes
    peer_signature: bytes


class Signed(msgspec.Struct, frozen=True, array_like=True):
    """An encoded statement with its author's signature (by the key inside its peer id) and certificate."""

    payload: bytes
    signature: bytes
    certificate: Certificate | None
