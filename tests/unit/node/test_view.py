"""A client's view of the swarm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, MissingBlocks, PeerLost
from bsns.core.ids import ModelId, PeerId
from bsns.node.client import Client
from bsns.node.view import ROUND_TRIP_FRESH_S, View
from bsns.planning.selection import Weights
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.routing.chain import Wish
from bsns.swarm.directory import MemoryDirectory

HONEST = NodeRecord(
    peer=PeerId("honest"),
    addresses=(),
    model=ModelId("m"),
    model_name="m",
    block_count=4,
    start=0,
    end=4,
    state="serving",
    device="cpu",
    dtype="float32",
    executor="torch",
    threads=1,
    cache_tokens=100,
    cache_tokens_left=100,
    block_time_s=0.001,
    rss_bytes=1,
    version="0",
    started_s=0.0,
    expires_s=time.time() + 3600,
)


async def test_a_node_that_cuts_the_model_short_is_not_seen() -> None:
    """Its peer id sorts first: who believed its number of blocks would compute one block and call it the model."""
    directory = MemoryDirectory()
    liar = msgspec.structs.replace(HONEST, peer=PeerId("a liar"), block_count=1, end=1)
    for record in (HONEST, liar):
        await directory.publish(record)
    assert await View(directory, HONEST.model, None, 4).records() == [HONEST]
    assert await View(directory, HONEST.model, "float32", 4).records() == [HONEST]
    assert await View(directory).records() == [liar, HONEST]


class Pings:
    """Links that answer at once after the round trips given, or not at all."""

    def __init__(self, round_trips_s: dict[str, float]) -> None:
        self._round_trips_s = round_trips_s
        self.asked: list[str] = []

    async def to(self, peer: PeerId, addresses: Sequence[str] = ()) -> Any:
        self.asked.append(peer)
        if peer not in self._round_trips_s:
            raise PeerLost("gone")

        class Answering:
            async def ping(_) -> float:
                return self._round_trips_s[peer]

        return Answering()


async def test_a_route_over_what_nodes_measured_of_each_other() -> None:
    def node(name: str, start: int, end: int, **ways_s: float) -> NodeRecord:
        links = tuple(LinkRecord(PeerId(peer), way_s, 0.0, 1e9, 0.0) for peer, way_s in ways_s.items())
        return msgspec.structs.replace(HONEST, peer=PeerId(name), start=start, end=end, links=links, sessions=1)

    directory = MemoryDirectory()
    for record in (node("a", 0, 2, b=0.5, c=0.01), node("b", 2, 4), node("c", 2, 4), node("d", 2, 4, a=0.0)):
        await directory.publish(record)
    pings: Any = Pings({"a": 0.001, "b": 0.001, "c": 0.002})
    view = View(directory, HONEST.model, "float32", 4)
    route = await view.route(pings, 10, ())
    assert [hop.peer for hop in route] == ["a", "c"]  # b is far from a, and d does not answer
    assert sorted(pings.asked) == ["a", "b", "c", "d"]
    seen = view.snapshot()
    far = seen.link(PeerId("a"), PeerId("b"))
    assert far is not None
    assert far.round_trip_s == 0.5
    assert {peer: link.round_trip_s for peer, link in seen.client.items()} == {"a": 0.001, "b": 0.001, "c": 0.002}
    assert dict(view.sessions()) == {"a": 2, "b": 1, "c": 2, "d": 1}
    view.release(route)
    assert dict(view.sessions()) == {"a": 1, "b": 1, "c": 1, "d": 1}
    await view.route(pings, 10, ())
    assert len(pings.asked) == 4  # what was measured is fresh still
    view = View(directory, HONEST.model, "float32", 4, wish=Wish(weights=Weights(latency=0.0)))
    assert [hop.peer for hop in await view.route(pings, 10, ())] == ["a", "b"]


async def test_a_round_trip_taken_while_we_are_busy_makes_no_detour() -> None:
    """The least of the latest three counts: a longer way is believed when it has stayed so."""
    clock, directory = HandClock(), MemoryDirectory()
    for name in ("a", "b"):
        await directory.publish(msgspec.structs.replace(HONEST, peer=PeerId(name)))
    round_trips_s = {"a": 0.001, "b": 0.004}
    pings: Any = Pings(round_trips_s)
    view = View(directory, HONEST.model, "float32", 4, clock=clock)

    async def first() -> str:
        route = await view.route(pings, 10, ())
        view.release(route)
        return route[0].peer

    assert await first() == "a"
    round_trips_s["a"] = 0.080
    for expected in ("a", "a", "b"):
        clock.ahead_s += ROUND_TRIP_FRESH_S + 1
        assert await first() == expected
    assert view.round_trip_s(PeerId("a")) == 0.080
    round_trips_s["a"] = 0.001
    clock.ahead_s += ROUND_TRIP_FRESH_S + 1
    assert await first() == "a"
    del round_trips_s["a"]
    clock.ahead_s += ROUND_TRIP_FRESH_S + 1
    assert await first() == "b"
    assert view.round_trip_s(PeerId("a")) is None


@pytest.mark.parametrize(
    "options", [{"objective": "speed"}, {"weights": "price=much"}, {"weights": "cheap", "objective": "throughput"}]
)
def test_a_client_refuses_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        Client("invite", **options)


async def test_a_node_that_a_reading_misses_is_not_forgotten_before_its_record_ends() -> None:
    clock = HandClock()
    directory = MemoryDirectory(clock=clock.unix_s)
    spare = msgspec.structs.replace(HONEST, peer=PeerId("spare"), start=2, end=4, expires_s=clock.unix_s() + 75)
    await directory.publish(spare)
    view = View(directory, HONEST.model, "float32", 4, clock=clock)
    links: Any = Pings({"spare": 0.001})
    blocks = BlockRange(2, 4)
    assert [hop.peer for hop in await view.route(links, 10, (), blocks)] == ["spare"]
    directory.shelf.clear()
    clock.ahead_s = 10.0
    assert [hop.peer for hop in await view.route(links, 10, (), blocks, fresh=True)] == ["spare"]
    assert await view.records() == []
    with pytest.raises(MissingBlocks):
        await view.route(links, 10, {PeerId("spare")}, blocks, fresh=True)
    clock.ahead_s = 80.0
    with pytest.raises(MissingBlocks):
        await view.route(links, 10, (), blocks, fresh=True)


class HandClock:
    """Time as the test puts it."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return 100.0 + self.ahead_s

    def unix_s(self) -> float:
        return 1e9 + self.ahead_s
