"""The greeting: the first frame each side of a stream says, and the only one before membership is proven."""

from __future__ import annotations

import msgspec

from bsns.protocol.membership import Certificate


class DirectOffer(msgspec.Struct, frozen=True, array_like=True):
    """Where an admitted peer may connect by TCP, with a token for one connection and the key that seals its frames."""

    hosts: tuple[str, ...]
    port: int
    token: bytes
    key: bytes


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """From whoever opened the stream: which swarm it means, and the proof that it belongs there."""

    version: int
    swarm: str
    certificate: Certificate | None


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to an accepted Hello, with the acceptor's own proof."""

    version: int
    certificate: Certificate | None
    direct: DirectOffer | None = None


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """The answer to a Hello that is not accepted; the stream closes after it. `code` is a class of core.errors."""

    code: str
    message: str
