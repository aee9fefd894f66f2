"""Plan records: what the leaseholder signs is obeyed; what is forged, replayed, stale or a stranger's is not."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, BsnsError, FrameTooLarge, NotAMember, NotTheOrchestrator, StalePlan
from bsns.core.ids import ModelId, PeerId
from bsns.protocol.membership import Signed
from bsns.protocol.plans import Assignment, PlanRecord
from bsns.swarm.directory import MemoryDirectory
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership
from bsns.swarm.plans import (
    MAX_ASSIGNMENTS,
    MAX_LEASE_S,
    MAX_PLAN_BYTES,
    PLAN,
    Reign,
    draw,
    lease_of,
    lot_of,
    open_plan,
    ranges_of,
    sign_plan,
)

NOW_S = 1_800_000_000.0
MODEL = ModelId("m" * 64)


def member_of(founder: Founder, lifetime_s: float = 3600.0) -> Membership:
    return Membership.from_invite(Identity.draw(), founder.make_invite((), lifetime_s, now_s=NOW_S))


def plan_of(author: Membership, *, term: int = 3, **changes: object) -> PlanRecord:
    plan = PlanRecord(
        author=author.peer,
        model=MODEL,
        block_count=30,
        dtype="bfloat16",
        term=term,
        lot=draw(author.identity, author.swarm, MODEL, term),
        version=2,
        objective=(1.0, 0.0),
        assignments=(Assignment(author.peer, 0, 12), Assignment(Identity.draw().peer, 12, 30)),
        bottleneck_s=0.02,
        latency_s=0.03,
        lower_bound_s=0.019,
        issued_s=NOW_S - 1,
        expires_s=NOW_S + 9,
    )
    return msgspec.structs.replace(plan, **changes)


def signed_raw(plan: PlanRecord, member: Membership) -> bytes:
    """A signed plan as a hostile member makes it: signed in order, never checked."""
    payload = msgspec.msgpack.encode(plan)
    signature = member.identity.sign(PLAN.statement(member.swarm, payload))
    return msgspec.msgpack.encode(Signed(payload, signature, member.certificate))


def test_a_plan_opens_as_signed_and_says_who_holds_what() -> None:
    founder = Founder.found()
    author, reader = member_of(founder), member_of(founder)
    plan = plan_of(author)
    assert open_plan(sign_plan(plan, author), reader, NOW_S, author.peer) == plan
    assert ranges_of(plan)[author.peer] == BlockRange(0, 12)
    lot = lot_of(author.peer, author.swarm, MODEL, 3, plan.lot)
    assert (lease_of(plan).holder, lease_of(plan).term, lease_of(plan).lot) == (author.peer, 3, lot)


def test_everybody_can_check_a_draw_and_nobody_has_another() -> None:
    founder = Founder.found()
    author, other = member_of(founder), member_of(founder)
    drawn = draw(author.identity, author.swarm, MODEL, 7)
    assert drawn == draw(author.identity, author.swarm, MODEL, 7)
    assert lot_of(author.peer, author.swarm, MODEL, 7, drawn) == hashlib.sha256(drawn).digest()
    for peer, swarm, model, term in (
        (other.peer, author.swarm, MODEL, 7),
        (author.peer, member_of(Founder.found()).swarm, MODEL, 7),
        (author.peer, author.swarm, ModelId("n" * 64), 7),
        (author.peer, author.swarm, MODEL, 8),
        (author.peer, author.swarm, MODEL, -1),
        (PeerId("nobody"), author.swarm, MODEL, 7),
    ):
        assert lot_of(peer, swarm, model, term, drawn) is None
    assert lot_of(author.peer, author.swarm, MODEL, 7, b"") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelId("")},
        {"model": ModelId("x" * 129)},
        {"model": ModelId("\x1b[2J")},
        {"dtype": "int64"},
        {"block_count": 0},
        {"block_count": 10**6},
        {"term": 0},
        {"term": 2**60},
        {"version": -1},
        {"version": 0},
        {"lot": b"short"},
        {"objective": (-1.0, 0.0)},
        {"objective": (float("nan"), 0.0)},
        {"bottleneck_s": float("inf")},
        {"latency_s": -1.0},
        {"lower_bound_s": float("nan")},
        {"issued_s": float("nan")},
        {"expires_s": float("inf")},
        {"expires_s": NOW_S - 1 + MAX_LEASE_S + 1},
        {"issued_s": NOW_S + 100, "expires_s": NOW_S + 110},
        {"assignments": (Assignment(PeerId("nobody"), 0, 1),)},
    ],
)
def test_insane_values_are_refused(changes: dict[str, object]) -> None:
    author = member_of(Founder.found())
    with pytest.raises(BadFrame):
        open_plan(signed_raw(plan_of(author, **changes), author), author, NOW_S)


@pytest.mark.parametrize("blocks", [(-1, 3), (4, 4), (5, 4), (29, 31)])
def test_impossible_assignments_are_refused(blocks: tuple[int, int]) -> None:
    author = member_of(Founder.found())
    bad = Assignment(author.peer, *blocks)
    with pytest.raises(BadFrame):
        open_plan(signed_raw(plan_of(author, assignments=(bad,)), author), author, NOW_S)


def test_a_node_is_assigned_once_and_not_too_many_are() -> None:
    author = member_of(Founder.found())
    with pytest.raises(BadFrame, match="twice"):
        sign_plan(plan_of(author, assignments=(Assignment(author.peer, 0, 1), Assignment(author.peer, 1, 2))), author)
    crowd = tuple(Assignment(author.peer, 0, 1) for _ in range(MAX_ASSIGNMENTS + 1))
    with pytest.raises(BadFrame, match=str(MAX_ASSIGNMENTS)):
        sign_plan(plan_of(author, assignments=crowd), author)
    with pytest.raises(FrameTooLarge):
        open_plan(bytes(MAX_PLAN_BYTES + 1), author, NOW_S)


def test_a_plan_for_as_many_nodes_as_may_be_fits() -> None:
    author = member_of(Founder.found())
    peers = [Identity((1 + n).to_bytes(32, "big")).peer for n in range(MAX_ASSIGNMENTS)]
    plan = plan_of(author, block_count=10_000, assignments=tuple(Assignment(peer, 8_000, 9_999) for peer in peers))
    assert open_plan(sign_plan(plan, author), author, NOW_S) == plan


def test_forged_plans_are_refused() -> None:
    founder = Founder.found()
    author, other, reader = member_of(founder), member_of(founder), member_of(founder)
    plan = plan_of(author)
    signed = sign_plan(plan, author)
    envelope = msgspec.msgpack.decode(signed, type=Signed)

    def refused(attempt: bytes, kind: type[BsnsError], who: Membership = reader, now_s: float = NOW_S) -> None:
        with pytest.raises(kind):
            open_plan(attempt, who, now_s, author.peer)

    def forged(**changes: object) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(envelope, **changes))

    refused(forged(payload=msgspec.msgpack.encode(plan_of(author, version=3))), BadFrame)
    refused(forged(signature=bytes(64)), BadFrame)
    refused(forged(signature=b""), BadFrame)
    refused(signed_raw(plan, other), NotAMember)  # shown with another's certificate
    refused(forged(signature=msgspec.msgpack.decode(signed_raw(plan, other), type=Signed).signature), BadFrame)
    refused(sign_plan(plan_of(other), other), BadFrame)  # under another's name in the directory
    refused(b"", BadFrame)
    refused(b"\xc1" * 100, BadFrame)
    # another's lot, one of another term, one drawn in another swarm
    refused(signed_raw(plan_of(author, lot=plan_of(other).lot), author), NotTheOrchestrator)
    refused(signed_raw(plan_of(author, lot=plan_of(author, term=4).lot), author), NotTheOrchestrator)
    elsewhere = draw(author.identity, member_of(Founder.found()).swarm, MODEL, 3)
    refused(signed_raw(plan_of(author, lot=elsewhere), author), NotTheOrchestrator)
    # expired, and of a member of another swarm
    refused(signed, StalePlan, now_s=plan.expires_s)
    refused(signed, NotAMember, who=member_of(Founder.found()))
    outsider = Membership(Identity.draw(), swarm_key=founder.swarm_key, open_swarm=True, certificate=None)
    with pytest.raises(NotAMember):
        open_plan(sign_plan(plan_of(outsider), outsider), reader, NOW_S)
    # the witness: what it was made from opens
    assert open_plan(signed, reader, NOW_S, author.peer) == plan


def test_nothing_in_a_plan_is_looked_at_before_its_signature() -> None:
    """Its thousands of ids take time to check, which nobody outside the swarm may have."""
    founder = Founder.found()
    author, reader = member_of(founder), member_of(founder)
    absurd = plan_of(author, assignments=(Assignment(PeerId("nobody"), 9, 3),))
    with pytest.raises(BadFrame, match=r"not sane|peer id"):
        open_plan(signed_raw(absurd, author), reader, NOW_S)
    forged = msgspec.msgpack.encode(Signed(msgspec.msgpack.encode(absurd), bytes(64), author.certificate))
    with pytest.raises(BadFrame, match="not signed"):
        open_plan(forged, reader, NOW_S)


def test_a_plan_is_good_in_its_own_swarm_only() -> None:
    """The same identity, a member of two swarms, cannot be made to govern the other."""
    one, other = Founder.found(), Founder.found()
    identity = Identity.draw()
    here = Membership.from_invite(identity, one.make_invite((), 3600, now_s=NOW_S))
    there = Membership.from_invite(identity, other.make_invite((), 3600, now_s=NOW_S))
    plan = plan_of(here)
    envelope = msgspec.msgpack.decode(sign_plan(plan, here), type=Signed)
    carried = msgspec.msgpack.encode(msgspec.structs.replace(envelope, certificate=there.certificate))
    with pytest.raises(BadFrame, match="not signed"):
        open_plan(carried, there, NOW_S)


def test_a_plan_does_not_outlive_its_certificate() -> None:
    author = member_of(Founder.found(), lifetime_s=5.0)
    with pytest.raises(BadFrame, match="outlives"):
        open_plan(signed_raw(plan_of(author), author), author, NOW_S)


def test_only_the_leaseholder_is_obeyed() -> None:
    founder = Founder.found()
    author, other = member_of(founder), member_of(founder)
    reign = Reign()
    for holder in (other.peer, None):
        with pytest.raises(NotTheOrchestrator):
            reign.accept(plan_of(author), holder)
    assert reign.plan is None
    assert reign.accept(plan_of(author), author.peer)


def test_older_plans_are_stale_whoever_shows_them() -> None:
    founder = Founder.found()
    author, other = member_of(founder), member_of(founder)
    reign = Reign()
    assert reign.accept(plan_of(author), author.peer)
    assert not reign.accept(plan_of(author), author.peer)  # the same again is neither new nor stale
    assert not reign.accept(plan_of(author, expires_s=NOW_S + 12), author.peer)
    assert reign.plan is not None
    assert reign.plan.expires_s == NOW_S + 12
    with pytest.raises(StalePlan):
        reign.accept(plan_of(author, version=1), author.peer)
    with pytest.raises(StalePlan):
        reign.accept(plan_of(other, term=2, version=9), other.peer)
    assert reign.accept(plan_of(author, version=3), author.peer)
    assert reign.accept(plan_of(other, version=1), other.peer)  # of the same term, with a better lot
    assert reign.accept(plan_of(author, term=4, version=0, assignments=()), author.peer)
    assert reign.plan.term == 4


async def test_plans_in_memory_expire() -> None:
    now_s = [NOW_S]
    directory = MemoryDirectory(clock=lambda: now_s[0])
    plan = plan_of(member_of(Founder.found()))
    await directory.publish_plan(plan)
    assert await directory.plans() == [plan]
    now_s[0] = plan.expires_s
    assert await directory.plans() == []
