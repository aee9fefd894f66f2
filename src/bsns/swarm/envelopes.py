"""Statements in the directory: they travel with their author's signature and certificate, good in one swarm. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from bsns.core.errors import BadFrame, FrameTooLarge
from bsns.core.ids import PeerId, SwarmId
from bsns.protocol.membership import Signed
from bsns.swarm.identity import SIGNATURE_BYTES, public_key_of, verify
from bsns.swarm.membership import Membership

_decoder = msgspec.msgpack.Decoder(Signed)


class Expiring(Protocol):
    """A statement that holds until a date, in Unix time."""

    @property
    def expires_s(self) -> float: ...


S = TypeVar("S", bound=Expiring)


@dataclass(frozen=True)
class Envelope(Generic[S]):
    """One kind of statement: how it is called, what sets its signatures apart, and who says so."""

    kind: str
    purpose: bytes
    limit: int
    """The most bytes that one may have with everything around it."""
    decoder: msgspec.msgpack.Decoder[S]
    author_of: Callable[[S], PeerId]

    def statement(self, swarm: SwarmId, payload: bytes) -> bytes:
        """What the author signs."""
        return self.purpose + swarm.encode() + payload

    def seal(self, record: S, membership: Membership) -> bytes:
        """Our own statement as the bytes that travel. Raises BadFrame for another's, and FrameTooLarge."""
        if self.author_of(record) != membership.peer:
            raise BadFrame(f"a {self.kind} of {self.author_of(record)} cannot be signed by {membership.peer}")
        payload = msgspec.msgpack.encode(record)
        signature = membership.identity.sign(self.statement(membership.swarm, payload))
        signed = msgspec.msgpack.encode(Signed(payload, signature, membership.certificate))
        self._check_size(signed)
        return signed

    def open(self, signed: bytes, membership: Membership, now_s: float, author: PeerId | None) -> S:
        """What a member of this swarm has signed, and `author` if given; nothing else about it has been checked.

        Raises FrameTooLarge, NotAMember, or BadFrame for what is undecodable, another's, forged, or outlives its
        author's certificate.
        """
        self._check_size(signed)
        try:
            envelope = _decoder.decode(signed)
            record = self.decoder.decode(envelope.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(f"undecodable {self.kind}: {error}") from None
        peer = self.author_of(record)
        if author is not None and peer != author:
            raise BadFrame(f"a {self.kind} of {peer} was shown as that of {author}")
        key = public_key_of(peer)
        membership.verify(envelope.certificate, peer, now_s)
        # so that a statement, once valid, stays valid until its own end: others may hold it meanwhile
        if envelope.certificate is not None and not record.expires_s <= envelope.certificate.expires_s:
            raise BadFrame(f"the {self.kind} of {peer} outlives its certificate")
        statement = self.statement(membership.swarm, envelope.payload)
        if len(envelope.signature) != SIGNATURE_BYTES or not verify(key, statement, envelope.signature):
            raise BadFrame(f"the {self.kind} of {peer} is not signed by it")
        return record

    def _check_size(self, signed: bytes) -> None:
        if len(signed) > self.limit:
            raise FrameTooLarge(f"{self.kind} of {len(signed)} bytes; the limit is {self.limit}")
