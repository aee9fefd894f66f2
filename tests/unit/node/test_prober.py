"""A prober in a swarm in memory: whom it measures, and whom it leaves alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from memory_swarm import MemorySwarm

from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerTimedOut
from bsns.core.ids import PeerId, SessionId
from bsns.node import prober as module
from bsns.node.prober import Prober, neighbours_of
from bsns.protocol.records import NodeRecord
from bsns.worker.batching import Batch

OWN = PeerId("own")


class Idle:
    """An executor that nobody asks to run."""

    name, blocks, hidden_size, dtype, device = "idle", BlockRange(0, 2), 4, "float32", "cpu"

    def open(self, session: SessionId, max_tokens: int) -> None: ...

    def close(self, session: SessionId) -> None: ...

    def run(self, batch: Batch) -> list[memoryview]:
        raise AssertionError


class Scene:
    """A prober among nodes, its clock as far ahead as the test puts it."""

    def __init__(self, swarm: MemorySwarm) -> None:
        self.swarm = swarm
        self.ahead_s = 0.0
        self.busy = False
        self.read_s: dict[int, float] = {}
        """How long the directory is read, by the number of the read; none at all otherwise."""
        self.reads = 0
        self.prober = Prober(
            OWN,
            swarm.network.transport(OWN).dial,
            self.read,
            busy=lambda: self.busy,
            rng=np.random.default_rng(0),
            clock=self,
        )

    def now_s(self) -> float:
        return time.thread_time() + self.ahead_s

    def unix_s(self) -> float:
        return time.time() + self.ahead_s

    async def read(self) -> Sequence[NodeRecord]:
        self.ahead_s += self.read_s.get(self.reads, 0.0)
        self.reads += 1
        return await self.swarm.directory.records()

    async def nodes(self, *names: str) -> None:
        for name in names:
            await self.swarm.add_node(name, Idle(), block_count=8)

    async def visits(self, count: int) -> list[PeerId | None]:
        visited = []
        for _ in range(count):
            visited.append(await self.prober.visit())
            self.ahead_s += 1.0
        return visited

    def record(self, name: str) -> NodeRecord:
        return self.swarm.directory.shelf[PeerId(name)]


@pytest.fixture
async def scene(swarm: MemorySwarm) -> Scene:
    return Scene(swarm)


async def test_everybody_is_measured_and_nobody_twice_at_once(scene: Scene) -> None:
    await scene.nodes(OWN, "a", "b")
    visited = await scene.visits(40)
    assert set(visited[:2]) == {"a", "b"}
    assert visited.count("a") in (4, 5)  # three rounds 3 s apart, then one in 15 s
    assert OWN not in visited
    links = {link.peer: link for link in scene.prober.links()}
    assert links.keys() == {"a", "b"}
    for link in links.values():
        assert 0 < link.round_trip_s < 1
        assert 1e5 < link.bytes_per_s < 1e12
    assert scene.prober.rounds == len([peer for peer in visited if peer is not None])


async def test_news_are_told_once(scene: Scene) -> None:
    await scene.nodes("a")
    assert not scene.prober.has_news()
    await scene.visits(1)
    assert scene.prober.has_news()
    scene.prober.published(scene.prober.links())
    assert not scene.prober.has_news()
    scene.ahead_s += 100
    assert not scene.prober.has_news()
    scene.prober.published(())
    assert not scene.prober.has_news()  # not so soon again
    scene.ahead_s += module.PUBLISH_S
    assert scene.prober.has_news()


async def test_a_newcomer_is_measured_within_two_seconds(scene: Scene) -> None:
    await scene.nodes("a")
    await scene.visits(10)
    await scene.nodes("b")
    assert "b" in await scene.visits(3)


@pytest.mark.parametrize("slow", [{0}, {3}, {0, 1, 2, 3}])
async def test_reads_that_take_long_once_keep_nobody_waiting(scene: Scene, slow: set[int]) -> None:
    scene.read_s = dict.fromkeys(slow, 2.0)
    await scene.nodes("a")
    await scene.visits(10)
    await scene.nodes("b")
    assert "b" in await scene.visits(3)


async def test_where_reading_takes_long_it_is_done_seldom(scene: Scene) -> None:
    scene.read_s = dict.fromkeys(range(1000), 0.5)
    await scene.nodes("a")
    await scene.visits(20)
    before, started_s = scene.reads, scene.now_s()
    await scene.visits(200)
    assert (scene.reads - before) * 0.5 <= 1.1 * module.READ_SHARE * (scene.now_s() - started_s)


async def test_whoever_does_not_answer_is_left_alone_and_the_others_are_not(scene: Scene) -> None:
    await scene.nodes("a", "b")
    scene.swarm.network.cut(OWN, PeerId("a"))
    visited = await scene.visits(40)
    assert visited.count("a") == 5  # after 2, 4, 8 and 16 s more
    assert visited.count("b") >= 4
    assert [link.peer for link in scene.prober.links()] == ["b"]
    scene.swarm.network.heal(OWN, PeerId("a"))
    await scene.visits(40)
    assert {link.peer for link in scene.prober.links()} == {"a", "b"}


async def test_who_has_left_or_not_begun_is_forgotten(scene: Scene) -> None:
    await scene.nodes("a", "b")
    await scene.visits(5)
    await scene.swarm.directory.withdraw(scene.record("a"))
    await scene.swarm.directory.publish(msgspec.structs.replace(scene.record("b"), state="joining"))
    assert await scene.visits(40) == [None] * 40
    assert scene.prober.links() == ()


async def test_a_busy_node_measures_only_what_it_does_not_know(scene: Scene) -> None:
    await scene.nodes("a", "b")
    scene.busy = True
    assert set(await scene.visits(2)) == {"a", "b"}
    assert set(await scene.visits(100)) == {None}
    assert "a" in await scene.visits(40)  # two minutes later
    scene.busy = False
    assert "b" in await scene.visits(30)


async def test_a_node_that_takes_no_more_probes_is_pinged_all_the_same(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.nodes("a")
    monkeypatch.setattr(scene.swarm.nodes["a"].worker._probes._all, "_burst", 8192.0)
    await scene.visits(1)
    (link,) = scene.prober.links()
    assert link.round_trip_s > 0
    assert link.bytes_per_s == float("inf")


async def test_links_are_kept_busy_for_no_more_than_their_share(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.nodes(*"abcdef")
    measured = []

    async def measure(link: object, *, bandwidth: bool) -> module.Measurement:
        measured.append(bandwidth)
        return module.Measurement((0.1,) * 5, 1e5 if bandwidth else None, 0.6 if bandwidth else 0.0)

    monkeypatch.setattr(module, "measure", measure)
    await scene.visits(600)
    assert sum(measured) * 0.6 <= module.BUSY_BURST_S + 600 * module.BUSY_SHARE + 2 * 0.6
    assert sum(measured) >= 6
    assert len(measured) > 150


class Dripping:
    """A link whose node lets every answer wait as long as it may."""

    peer = PeerId("slow")

    def __init__(self, pings_s: float) -> None:
        self._pings_s = pings_s

    async def ping(self, deadline_s: float) -> float:
        if self._pings_s:
            await asyncio.sleep(self._pings_s)
        return 0.01

    async def probe(self, body: memoryview, deadline_s: float) -> float:
        await asyncio.sleep(deadline_s)
        return deadline_s


async def test_who_drags_answers_out_holds_up_a_round_for_its_time_at_most() -> None:
    dragging: Any = Dripping(0.05)
    with pytest.raises(PeerTimedOut):
        await asyncio.wait_for(module.measure(dragging, bandwidth=True, within_s=0.1), 5)
    dragging = Dripping(0.0)
    found = await asyncio.wait_for(module.measure(dragging, bandwidth=True, within_s=0.1), 4)
    assert (found.round_trips_s, found.bytes_per_s) == ((0.01,) * module.PINGS, None)


def test_neighbours_hold_the_blocks_before_or_after() -> None:
    def node(name: str, *ranges: tuple[int, int]) -> NodeRecord:
        base: dict[str, object] = {"peer": PeerId(name), "start": ranges[0][0], "end": ranges[0][1]}
        fields = dict.fromkeys(NodeRecord.__struct_fields__[: NodeRecord.__struct_fields__.index("others")], 0)
        return NodeRecord(**fields | base, others=ranges[1:])  # type: ignore[arg-type]

    own = node("own", (2, 4))
    others = [node("before", (0, 2)), node("after", (9, 10), (4, 6)), node("same", (2, 4)), node("far", (6, 8))]
    assert neighbours_of(own, [own, *others]) == {"before", "after"}
