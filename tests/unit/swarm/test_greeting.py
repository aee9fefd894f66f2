"""The greeting: members meet, everybody else is told why not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from bsns.core.errors import (
    BadFrame,
    BsnsError,
    FrameTooLarge,
    NotAMember,
    PeerFailed,
    PeerLost,
    PeerTimedOut,
    VersionMismatch,
    WrongSwarm,
)
from bsns.core.ids import SessionId
from bsns.protocol.frames import PROTOCOL_VERSION, encode
from bsns.protocol.greeting import Hello, Refusal, Welcome
from bsns.protocol.inference import Part, Ping, Pong, Step
from bsns.protocol.tensors import TensorSpec
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership, admit, introduce
from bsns.transport.memory import MemoryNetwork, MemoryStream
from bsns.transport.port import Stream

NOW_S = 1_800_000_000.0


def now() -> float:
    return NOW_S


def member_of(founder: Founder, *, lifetime_s: float = 3600.0, open_swarm: bool = False) -> Membership:
    invite = founder.make_invite((), lifetime_s, open_swarm, now_s=NOW_S)
    return Membership.from_invite(Identity.draw(), invite)


@dataclass
class Meeting:
    """What came of one greeting: the error each side raised, if any, and the two ends."""

    dialler: BaseException | None
    acceptor: BaseException | None
    stream: Stream


async def meet(dialler: Membership, acceptor: Membership) -> Meeting:
    network = MemoryNetwork()
    one, other = network.transport(dialler.peer), network.transport(acceptor.peer)
    judged: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def accept(stream: Stream) -> None:
        try:
            await admit(stream, acceptor, 5.0, now)
        except BsnsError as error:
            judged.set_result(error)
            return
        judged.set_result(None)
        await stream.send(Pong(1))

    await other.listen(accept)
    stream = await one.dial(other.peer)
    failure: BaseException | None = None
    try:
        await introduce(stream, dialler, 5.0, now)
    except BsnsError as error:
        failure = error
    return Meeting(failure, await asyncio.wait_for(judged, 5.0), stream)


async def test_two_members_meet() -> None:
    founder = Founder.found()
    meeting = await meet(member_of(founder), member_of(founder))
    assert meeting.dialler is None
    assert meeting.acceptor is None
    assert (await meeting.stream.receive())[0] == Pong(1)


async def test_the_founder_is_a_member() -> None:
    founder = Founder.found()
    chief = Membership.of_founder(founder, Identity.draw(), NOW_S)
    assert (await meet(member_of(founder), chief)).dialler is None
    assert (await meet(chief, member_of(founder))).acceptor is None


async def test_members_by_open_and_closed_invites_know_each_other() -> None:
    founder = Founder.found()
    for openness in (False, True):
        meeting = await meet(member_of(founder, open_swarm=openness), member_of(founder, open_swarm=not openness))
        assert (meeting.dialler, meeting.acceptor) == (None, None)


def uninvited(founder: Founder) -> Membership:
    return Membership(Identity.draw(), swarm_key=founder.swarm_key, open_swarm=False, certificate=None)


async def test_the_uninvited_are_refused_with_the_reason() -> None:
    founder = Founder.found()
    meeting = await meet(uninvited(founder), member_of(founder))
    assert isinstance(meeting.dialler, NotAMember)
    assert "no certificate" in str(meeting.dialler)
    assert isinstance(meeting.acceptor, NotAMember)
    with pytest.raises(PeerLost):
        await meeting.stream.receive()


async def test_an_open_swarm_needs_no_certificate() -> None:
    founder = Founder.found()
    assert (await meet(uninvited(founder), member_of(founder, open_swarm=True))).acceptor is None


async def test_a_forged_expired_or_stolen_certificate_is_refused() -> None:
    founder, impostor = Founder.found(), Founder.found()
    host = member_of(founder)
    forged = member_of(impostor)
    victim = member_of(founder)
    thief = Identity.draw()
    assert victim.certificate is not None
    longer = msgspec.structs.replace(victim.certificate, expires_s=NOW_S + 1e9)
    for identity, certificate in [
        (forged.identity, forged.certificate),
        (thief, victim.certificate),
        (victim.identity, longer),
        (victim.identity, msgspec.structs.replace(victim.certificate, expires_s=float("nan"))),
        (victim.identity, msgspec.structs.replace(victim.certificate, invite_key=b"")),
        (victim.identity, msgspec.structs.replace(victim.certificate, peer_signature=b"\0" * 64)),
    ]:
        guest = Membership(identity, swarm_key=founder.swarm_key, open_swarm=False, certificate=certificate)
        meeting = await meet(guest, host)
        assert isinstance(meeting.dialler, NotAMember), certificate
        assert isinstance(meeting.acceptor, NotAMember)
    late = member_of(founder, lifetime_s=1.0)
    host.verify(late.certificate, late.peer, NOW_S)
    with pytest.raises(NotAMember, match="expired"):
        host.verify(late.certificate, late.peer, NOW_S + 1.0)


async def test_a_false_host_is_found_out() -> None:
    founder = Founder.found()
    meeting = await meet(
        member_of(founder), Membership(Identity.draw(), swarm_key=founder.swarm_key, open_swarm=True, certificate=None)
    )
    assert isinstance(meeting.dialler, NotAMember)


async def test_another_swarm_is_named() -> None:
    meeting = await meet(member_of(Founder.found()), member_of(Founder.found()))
    assert isinstance(meeting.dialler, WrongSwarm)
    assert isinstance(meeting.acceptor, WrongSwarm)


async def pair() -> tuple[MemoryStream, MemoryStream]:
    network = MemoryNetwork()
    one, other = network.transport("one"), network.transport("other")
    accepted: asyncio.Queue[MemoryStream] = asyncio.Queue()

    async def accept(stream: Stream) -> None:
        assert isinstance(stream, MemoryStream)
        await accepted.put(stream)
        await asyncio.Event().wait()

    await other.listen(accept)
    return await one.dial(other.peer), await accepted.get()


async def test_a_stranger_cannot_make_us_take_a_body() -> None:
    near, far = await pair()
    step = Step((Part(SessionId(1), 0, 1, 0),), (TensorSpec.raw("hidden", "float32", (1,)),))
    await near.send(step, [bytes(4)])
    with pytest.raises(FrameTooLarge):
        await admit(far, member_of(Founder.found()), 5.0, now)
    refusal, _ = await near.receive()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "FrameTooLarge"


async def test_whoever_does_not_greet_is_refused() -> None:
    near, far = await pair()
    await near.send(Ping(1))
    with pytest.raises(BadFrame):
        await admit(far, member_of(Founder.found()), 5.0, now)
    assert isinstance((await near.receive())[0], Refusal)


async def test_a_silent_stranger_is_dropped_at_the_deadline() -> None:
    near, far = await pair()
    with pytest.raises(PeerTimedOut):
        await admit(far, member_of(Founder.found()), 0.01, now)
    with pytest.raises(PeerLost):
        await near.receive()
    near, far = await pair()
    with pytest.raises(PeerTimedOut):
        await introduce(near, member_of(Founder.found()), 0.01, now)
    with pytest.raises(PeerLost):
        await near.send(Ping(1))


async def test_another_version_is_refused_on_either_side() -> None:
    member = member_of(Founder.found())
    near, far = await pair()
    await near.send(Hello(PROTOCOL_VERSION + 1, member.swarm, member.certificate))
    with pytest.raises(VersionMismatch):
        await admit(far, member, 5.0, now)
    near, far = await pair()
    await far.send(Welcome(PROTOCOL_VERSION + 1, member.certificate))
    with pytest.raises(VersionMismatch):
        await introduce(near, member, 5.0, now)


async def test_a_refusal_cannot_play_tricks() -> None:
    near, far = await pair()
    await far.send_bytes(b"".join(encode(Refusal("PortInUse", "\x1b[2Jtake another port" + "!" * 1000))))
    with pytest.raises(PeerFailed) as caught:
        await introduce(near, member_of(Founder.found()), 5.0, now)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400
