"""Membership: our own certificate, the judge of others', and the greeting that exchanges them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from bsns.core.errors import (
    BadFrame,
    BsnsError,
    NotAMember,
    PeerFailed,
    PeerLost,
    PeerTimedOut,
    ProtocolError,
    VersionMismatch,
    WrongSwarm,
)
from bsns.core.ids import PeerId, SwarmId
from bsns.protocol.frames import PROTOCOL_VERSION, Message
from bsns.protocol.greeting import DirectOffer, Hello, Refusal, Welcome
from bsns.protocol.membership import Certificate, Invite
from bsns.swarm.identity import Identity, verify
from bsns.swarm.invites import Founder, invite_statement, swarm_id
from bsns.transport.port import Stream

FOUNDER_LIFETIME_S = 10 * 365 * 86400.0
REFUSAL_DEADLINE_S = 1.0
_REMEMBERED = 1024
_GREETING_ERRORS: dict[str, type[BsnsError]] = {
    kind.__name__: kind for kind in (NotAMember, WrongSwarm, VersionMismatch, BadFrame)
}

Clock = Callable[[], float]


def member_statement(peer: PeerId) -> bytes:
    """What an invite key signs to vouch for a peer."""
    return b"bsns/member/1" + peer.encode()


class Membership:
    """A node's place in one swarm. In an open swarm peers need no certificate."""

    def __init__(
        self, identity: Identity, *, swarm_key: bytes, open_swarm: bool, certificate: Certificate | None
    ) -> None:
        self.identity = identity
        self.swarm_key = swarm_key
        self.swarm: SwarmId = swarm_id(swarm_key)
        self.open_swarm = open_swarm
        self.certificate = certificate
        self._proven: OrderedDict[tuple[Certificate, PeerId], None] = OrderedDict()

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def expires_s(self) -> float:
        """When our own certificate ends, in Unix time; never, without one."""
        return self.certificate.expires_s if self.certificate is not None else math.inf

    @classmethod
    def from_invite(cls, identity: Identity, invite: Invite) -> Membership:
        """Join by an invite that `parse_invite` has accepted: its key signs our peer id."""
        invite_key = Identity(invite.invite_seed)
        certificate = Certificate(
            invite_key=invite_key.public_key,
            expires_s=invite.expires_s,
            invite_signature=invite.signature,
            peer_signature=invite_key.sign(member_statement(identity.peer)),
        )
        return cls(identity, swarm_key=invite.swarm_key, open_swarm=invite.open, certificate=certificate)

    @classmethod
    def of_founder(cls, founder: Founder, identity: Identity, now_s: float, *, open_swarm: bool = False) -> Membership:
        """The founder's own: ten years, since it can renew itself at will."""
        invite = founder.make_invite((), FOUNDER_LIFETIME_S, open_swarm, now_s=now_s)
        return cls.from_invite(identity, invite)

    def verify(self, certificate: Certificate | None, peer: PeerId, now_s: float) -> None:
        """Raises NotAMember, with the reason, unless the certificate makes `peer` a member of this swarm at `now_s`."""
        if certificate is None:
            if self.open_swarm:
                return
            raise NotAMember(
                f"{peer} showed no certificate; join with an invite from the founder of swarm {self.swarm}"
            )
        if not (math.isfinite(certificate.expires_s) and now_s < certificate.expires_s):
            raise NotAMember(f"the certificate of {peer} has expired; ask the swarm's founder for a new invite")
        known = (certificate, peer)
        if known in self._proven:
            return
        # an invite says whether its holder's swarm is open, and a certificate may come from an invite of either kind
        vouched = any(
            verify(
                self.swarm_key,
                invite_statement(certificate.invite_key, certificate.expires_s, open_swarm),
                certificate.invite_signature,
            )
            for open_swarm in (self.open_swarm, not self.open_swarm)
        )
        if not vouched:
            raise NotAMember(f"the certificate of {peer} comes from an invite that swarm {self.swarm} did not sign")
        if not verify(certificate.invite_key, member_statement(peer), certificate.peer_signature):
            raise NotAMember(f"the certificate that {peer} showed was made for another peer")
        self._proven[known] = None
        if len(self._proven) > _REMEMBERED:
            self._proven.popitem(last=False)


async def introduce(
    stream: Stream, membership: Membership, deadline_s: float, clock: Clock = time.time
) -> DirectOffer | None:
    """Greet the peer we dialled: show our certificate and check its own; on any failure the stream is closed.

    Returns the direct stream the peer offers, if it does.

    Raises NotAMember, WrongSwarm or VersionMismatch, whoever of the two refused; PeerTimedOut after `deadline_s`;
    PeerLost; another ProtocolError for nonsense.
    """
    try:
        async with asyncio.timeout(deadline_s):
            await stream.send(Hello(PROTOCOL_VERSION, membership.swarm, membership.certificate))
            answer, _ = await stream.receive(max_body_bytes=0)
        match answer:
            case Welcome():
                _check_version(answer.version, stream.peer)
                membership.verify(answer.certificate, stream.peer, clock())
                return answer.direct
            case Refusal():
                raise _refused(answer)
            case _:
                raise BadFrame(f"{stream.peer} answered a greeting with {_kind(answer)}")
    except TimeoutError:
        await stream.close()
        raise PeerTimedOut(f"{stream.peer} did not answer the greeting within {deadline_s:g} s") from None
    except BaseException:
        await stream.close()
        raise


async def admit(
    stream: Stream,
    membership: Membership,
    deadline_s: float,
    clock: Clock = time.time,
    offer: Callable[[PeerId], DirectOffer | None] = lambda peer: None,
) -> None:
    """Let in the peer that opened a stream, or send it a typed Refusal, close the stream and raise the same error.

    Until then not one byte of body is accepted; `offer` is asked only for members. Raises as `introduce` does.
    """
    try:
        async with asyncio.timeout(deadline_s):
            hello, _ = await stream.receive(max_body_bytes=0)
            if not isinstance(hello, Hello):
                raise BadFrame(f"{stream.peer} began with {_kind(hello)} in place of a greeting")
            _check_version(hello.version, stream.peer)
            if hello.swarm != membership.swarm:
                raise WrongSwarm(f"this peer belongs to swarm {membership.swarm}, not to the one asked for")
            membership.verify(hello.certificate, stream.peer, clock())
            await stream.send(Welcome(PROTOCOL_VERSION, membership.certificate, offer(stream.peer)))
    except TimeoutError:
        await stream.close()
        raise PeerTimedOut(f"{stream.peer} did not greet within {deadline_s:g} s") from None
    except (ProtocolError, WrongSwarm) as error:
        await _refuse(stream, error)
        raise
    except BaseException:
        await stream.close()
        raise


async def _refuse(stream: Stream, error: BsnsError) -> None:
    try:
        async with asyncio.timeout(REFUSAL_DEADLINE_S):
            await stream.send(Refusal(error.code, error.message))
    except (PeerLost, TimeoutError):
        pass  # it left, or does not read: there is nobody to tell
    finally:
        await stream.close()


def _check_version(version: int, peer: PeerId) -> None:
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"{peer} speaks protocol version {version}, this node {PROTOCOL_VERSION}; upgrade the older"
        )


def _refused(refusal: Refusal) -> BsnsError:
    """The refusal as an error: only those a greeting can end in, and nothing that could play tricks on a terminal."""
    message = "".join(letter for letter in refusal.message[:300] if letter.isprintable())
    kind = _GREETING_ERRORS.get(refusal.code)
    return kind(f"refused: {message}") if kind is not None else PeerFailed(f"refused: {message}")


def _kind(message: Message) -> str:
    return type(message).__name__
