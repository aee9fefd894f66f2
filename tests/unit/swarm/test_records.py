"""Records: what is signed opens, and nothing else does; the directory in memory forgets as it should."""

from __future__ import annotations

import msgspec
import pytest

from bsns.core.errors import BadFrame, BsnsError, FrameTooLarge, NotAMember
from bsns.core.ids import ModelId, PeerId
from bsns.protocol.membership import Signed
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.directory import MemoryDirectory
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership
from bsns.swarm.records import (
    MAX_LIFETIME_S,
    MAX_LINKS,
    MAX_RECORD_BYTES,
    RECORD,
    check_record,
    open_record,
    sign_record,
    with_links,
)

NOW_S = 4_000_000_000.0
"""Not yet past for what keeps time by itself."""


def member_of(founder: Founder, lifetime_s: float = 3600.0) -> Membership:
    return Membership.from_invite(Identity.draw(), founder.make_invite((), lifetime_s, now_s=NOW_S))


def record_of(peer: PeerId, **changes: object) -> NodeRecord:
    record = NodeRecord(
        peer=peer,
        addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{peer}",),
        model=ModelId("m" * 64),
        model_name="a/model",
        block_count=30,
        start=0,
        end=10,
        state="serving",
        device="cpu",
        dtype="float32",
        executor="torch",
        threads=1,
        cache_tokens=4096,
        cache_tokens_left=4000,
        block_time_s=0.001,
        rss_bytes=10**9,
        version="0.1.0",
        started_s=NOW_S - 10,
        expires_s=NOW_S + 120,
    )
    return msgspec.structs.replace(record, **changes)


def signed_raw(record: NodeRecord, member: Membership) -> bytes:
    """A signed record as a hostile member makes it: signed in order, never checked."""
    payload = msgspec.msgpack.encode(record)
    signature = member.identity.sign(RECORD.statement(member.swarm, payload))
    return msgspec.msgpack.encode(Signed(payload, signature, member.certificate))


def test_a_record_opens_as_signed() -> None:
    founder = Founder.found()
    author, reader = member_of(founder), member_of(founder)
    record = record_of(author.peer)
    assert open_record(sign_record(record, author), reader, NOW_S, author.peer) == record


@pytest.mark.parametrize(
    "change",
    [
        {"start": 5, "end": 5},
        {"start": -1},
        {"end": 31},
        {"block_count": 10**6, "end": 10**6},
        {"state": "hacked"},
        {"machine": b"x" * 15},
        {"machine": b"x" * 17},
        {"share": 0.0},
        {"share": 1.5},
        {"share": float("nan")},
        {"model_name": "x" * 257},
        {"device": "\x1b[2J"},
        {"dtype": "int64"},
        {"dtype": "load_library"},
        {"addresses": ("http://evil",)},
        {"addresses": ("/ip4/1.2.3.4/tcp/1/p2p/12D3KooWother",)},
        {"addresses": ("/ip4/1.2.3.4/tcp/1",) * 17},
        {"cache_tokens": -1},
        {"cache_tokens_left": 5000},
        {"cache_tokens": 2**63, "cache_tokens_left": 0},
        {"block_time_s": float("nan")},
        {"block_time_s": float("inf")},
        {"block_time_s": -1.0},
        {"rss_bytes": 2**63},
        {"baseline_bytes": -1},
        {"quant": "int8\n"},
        {"kv": "x" * 17},
        {"threads": -1},
        {"started_s": float("nan")},
        {"expires_s": float("inf")},
        {"expires_s": NOW_S},
        {"expires_s": NOW_S + MAX_LIFETIME_S + 1},
    ],
)
def test_insane_values_are_refused(change: dict[str, object]) -> None:
    author = member_of(Founder.found())
    with pytest.raises(BadFrame):
        open_record(signed_raw(record_of(author.peer, **change), author), author, NOW_S)


def test_forged_records_are_refused() -> None:
    founder = Founder.found()
    author, other, reader = member_of(founder), member_of(founder), member_of(founder)
    record = record_of(author.peer)
    signed = sign_record(record, author)
    envelope = msgspec.msgpack.decode(signed, type=Signed)

    def forged(**changes: object) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(envelope, **changes))

    outsider = member_of(Founder.found())
    attempts = [
        forged(payload=msgspec.msgpack.encode(record_of(author.peer, end=20))),
        forged(signature=bytes(64)),
        forged(signature=b""),
        forged(certificate=other.certificate),
        forged(certificate=None),
        signed_raw(record_of(author.peer), other),
        signed_raw(record_of(outsider.peer), outsider),
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1, 2, 3]),
        signed[:-1],
    ]
    for attempt in attempts:
        with pytest.raises((BadFrame, NotAMember)):
            open_record(attempt, reader, NOW_S)
    with pytest.raises(BadFrame, match="shown as"):
        open_record(signed, reader, NOW_S, other.peer)
    with pytest.raises(FrameTooLarge):
        open_record(bytes(MAX_RECORD_BYTES + 1), reader, NOW_S)
    for position in range(len(signed)):
        changed = bytearray(signed)
        changed[position] ^= 1
        with pytest.raises(BsnsError):
            open_record(bytes(changed), reader, NOW_S, author.peer)


def test_a_record_of_another_swarm_is_refused() -> None:
    identity = Identity.draw()
    one, other = Founder.found(), Founder.found()
    here = Membership.from_invite(identity, one.make_invite((), 3600, now_s=NOW_S))
    there = Membership.from_invite(identity, other.make_invite((), 3600, now_s=NOW_S))
    envelope = msgspec.msgpack.decode(sign_record(record_of(identity.peer), there), type=Signed)
    mixed = msgspec.structs.replace(envelope, certificate=here.certificate)
    with pytest.raises(BadFrame, match="not signed"):
        open_record(msgspec.msgpack.encode(mixed), here, NOW_S)


def test_a_record_cannot_outlive_its_certificate() -> None:
    author = member_of(Founder.found(), lifetime_s=60)
    with pytest.raises(BadFrame, match="outlives"):
        open_record(sign_record(record_of(author.peer), author), author, NOW_S)


def test_nobody_signs_for_another() -> None:
    author = member_of(Founder.found())
    with pytest.raises(BadFrame):
        sign_record(record_of(Identity.draw().peer), author)
    check_record(record_of(author.peer))


async def test_the_directory_in_memory() -> None:
    now_s = NOW_S
    one, other = Identity.draw().peer, Identity.draw().peer
    here = MemoryDirectory(clock=lambda: now_s)
    there = MemoryDirectory(here.shelf, clock=lambda: now_s)
    await here.publish(record_of(one))
    await there.publish(record_of(other, expires_s=NOW_S + 240))
    assert [record.peer for record in await here.records()] == sorted([one, other])
    now_s += 120
    assert [record.peer for record in await here.records()] == [other]
    await there.withdraw(record_of(other, expires_s=NOW_S + 240))
    assert await here.records() == []
    await here.close()


def link_to(peer: PeerId) -> LinkRecord:
    return LinkRecord(peer, 0.1234, 0.0123, 1.234e6, NOW_S - 3)


def test_links_travel_in_a_record() -> None:
    author = member_of(Founder.found())
    links = tuple(link_to(Identity.draw().peer) for _ in range(MAX_LINKS))
    record = with_links(record_of(author.peer, draw=bytes(64)), links, author)
    assert record.links == links
    assert open_record(sign_record(record, author), author, NOW_S) == record


@pytest.mark.parametrize("address_bytes", [0, 100, 175, 176, 177, 178, 179, 180, 200, 220])
def test_a_record_that_grows_too_long_drops_the_least_useful_links(address_bytes: int) -> None:
    author = member_of(Founder.found())
    address = f"/dns4/{'x' * address_bytes}/tcp/4001"
    links = tuple(link_to(Identity.draw().peer) for _ in range(MAX_LINKS + 5))
    bare = record_of(author.peer, addresses=(address,) * 14)
    record = with_links(bare, links, author)
    kept = len(record.links)
    assert record.links == links[:kept]
    assert len(sign_record(record, author)) <= MAX_RECORD_BYTES
    if kept < MAX_LINKS:
        longer = msgspec.structs.replace(record, links=links[: kept + 1])
        assert len(signed_raw(longer, author)) > MAX_RECORD_BYTES - 20
    assert kept == MAX_LINKS or address_bytes >= 100


@pytest.mark.parametrize(
    "link",
    [
        LinkRecord(PeerId("nobody"), 0.1, 0.0, 1e6, NOW_S),
        LinkRecord(Identity.draw().peer, float("nan"), 0.0, 1e6, NOW_S),
        LinkRecord(Identity.draw().peer, -0.1, 0.0, 1e6, NOW_S),
        LinkRecord(Identity.draw().peer, 0.1, 0.0, 0.0, NOW_S),
        LinkRecord(Identity.draw().peer, 0.1, 0.0, float("nan"), NOW_S),
        LinkRecord(Identity.draw().peer, 0.1, -1.0, 1e6, NOW_S),
        LinkRecord(Identity.draw().peer, 0.1, 0.0, 1e6, float("inf")),
    ],
)
def test_impossible_links_are_refused(link: LinkRecord) -> None:
    author = member_of(Founder.found())
    with pytest.raises(BsnsError):
        open_record(signed_raw(record_of(author.peer, links=(link,)), author), author, NOW_S)
