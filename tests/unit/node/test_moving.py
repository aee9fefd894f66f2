"""A node that follows plans: it loads before it drops, and drops nothing that others do not hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
from memory_swarm import MODEL, MemorySwarm, Node

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.node.capacity import Room
from bsns.node.moving import Mover
from bsns.protocol.inference import Open
from bsns.protocol.plans import Assignment, PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.identity import Identity
from bsns.worker.batching import Batch

BLOCKS = 8
OLD, NEW = BlockRange(0, 4), BlockRange(2, 6)
OTHERS = [Identity((1 + n).to_bytes(32, "big")).peer for n in range(3)]


class Idler:
    """An executor that computes nothing."""

    name, hidden_size, dtype, device = "idler", 4, "float32", "cpu"

    def __init__(self, blocks: BlockRange) -> None:
        self.blocks = blocks

    def open(self, session: SessionId, max_tokens: int) -> None: ...

    def close(self, session: SessionId) -> None: ...

    def run(self, batch: Batch) -> list[memoryview]:
        raise NotImplementedError


class Scene:
    """A node called `me` on OLD, its mover, and what it did, in order."""

    def __init__(self, node: Node, room: Room) -> None:
        self.worker = node.worker
        self.me = PeerId("me")
        self.did: list[str] = []
        self.mover = Mover(self.me, node.worker, room, self.load, self.announce)

    def load(self, blocks: BlockRange) -> Idler:
        self.did.append(f"load {blocks}")
        return Idler(blocks)

    async def announce(self) -> None:
        sessions = self.worker.sessions
        self.did.append("announce " + " ".join(map(str, sessions.open_ranges)))

    async def step(self, plan: PlanRecord | None, *records: NodeRecord, read_s: float | None = None) -> list[str]:
        """Obey what was read just now; what was done."""
        self.did.clear()
        self.mover.obey(plan, records, time.perf_counter() if read_s is None else read_s)
        await self.mover.step()
        for held in self.worker.sessions.ranges:
            assert held in self.worker._executors
        return list(self.did)

    def open(self, blocks: BlockRange, session: int = 1) -> None:
        message = Open(SessionId(session), MODEL, blocks.start, blocks.end, "float32", 16, 1, None)
        self.worker.sessions.open(message, PeerId("client"), 0.0)


def plan(*assignments: tuple[PeerId, BlockRange], version: int = 1) -> PlanRecord:
    named = tuple(Assignment(peer, blocks.start, blocks.end) for peer, blocks in assignments)
    return PlanRecord(OTHERS[0], MODEL, BLOCKS, "float32", 1, b"", version, (1.0, 0.0), named, 0.0, 0.0, 0.0, 0.0, 10.0)


def record(peer: PeerId, *ranges: BlockRange, state: str = "serving", follows: bool = True) -> NodeRecord:
    others = tuple((blocks.start, blocks.end) for blocks in ranges[1:])
    return NodeRecord(
        *(peer, (), MODEL, "tiny", BLOCKS, ranges[0].start, ranges[0].end, state, "cpu", "float32", "idler", 1),
        *(4096, 4096, 1e-3, 1, "0", 0.0, 1e12),
        others=others,
        follows=follows,
    )


def room(usable: int = 1000) -> Room:
    """Blocks of 100 bytes, tokens of 1 byte a block, 25 of which have to be promised."""
    return Room(usable, [100] * BLOCKS, 1, 0, usable, 25, 64)


@pytest.fixture
async def scene(swarm: MemorySwarm) -> Scene:
    return Scene(await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64), room())


ME = PeerId("me")
MOVED = plan((ME, NEW), (OTHERS[0], OLD))
COVER = record(OTHERS[0], OLD)


async def test_nothing_moves_without_a_plan(scene: Scene) -> None:
    assert await scene.step(None, COVER) == []
    assert await scene.step(plan((ME, NEW), version=0), COVER) == []
    assert await scene.step(plan((ME, OLD), (OTHERS[0], NEW)), COVER) == []


async def test_it_loads_before_it_drops_and_serves_both_meanwhile(scene: Scene) -> None:
    assert await scene.step(MOVED) == ["load 2:6", "announce 2:6 0:4"]
    assert scene.worker.sessions.ranges == (NEW, OLD)
    assert await scene.step(MOVED) == []  # nobody else holds the old one
    assert await scene.step(MOVED, COVER) == ["announce 2:6"]
    assert scene.worker.sessions.ranges == (NEW, OLD)
    assert await scene.step(MOVED, COVER) == ["announce 2:6"]
    assert scene.worker.sessions.ranges == (NEW,)
    assert scene.mover.moves == 1
    assert await scene.step(MOVED, COVER) == []


async def test_sessions_stay_where_they_are_until_they_end(scene: Scene) -> None:
    scene.open(BlockRange(2, 4))
    await scene.step(MOVED, COVER)
    scene.open(BlockRange(2, 4), session=2)
    held = [session.held for n in (1, 2) if (session := scene.worker.sessions.get(SessionId(n)))]
    assert held == [OLD, NEW]  # a new one prefers the new range
    await scene.step(MOVED, COVER)
    assert await scene.step(MOVED, COVER) == []
    assert scene.worker.sessions.ranges == (NEW, OLD)
    scene.worker.sessions.close(SessionId(1), PeerId("client"))
    await scene.step(MOVED, COVER)
    assert scene.worker.sessions.ranges == (NEW,)


@pytest.mark.parametrize(
    "others",
    [
        [],
        [record(OTHERS[0], BlockRange(0, 1))],  # not yet where the plan wants it
        [record(OTHERS[0], OLD, state="joining")],
        [record(OTHERS[1], OLD)],  # holds it, but the plan wants it elsewhere: it may be about to drop it on our word
        [record(OTHERS[1], OLD, BlockRange(0, 8))],
    ],
)
async def test_a_range_that_nobody_else_will_keep_is_kept(scene: Scene, others: Sequence[NodeRecord]) -> None:
    await scene.step(MOVED)
    for _ in range(3):
        assert await scene.step(MOVED, *others) == []
    assert scene.worker.sessions.open_ranges == (NEW, OLD)


async def test_what_a_pinned_node_holds_is_covered(scene: Scene) -> None:
    """And so is what the new range of our own covers."""
    moved = plan((ME, NEW))
    await scene.step(moved)
    await scene.step(moved, record(OTHERS[2], BlockRange(0, 2), follows=False))
    assert scene.worker.sessions.open_ranges == (NEW,)


async def test_a_range_that_is_uncovered_again_is_served_again(scene: Scene) -> None:
    scene.open(OLD)
    await scene.step(MOVED)
    assert await scene.step(MOVED, COVER) == ["announce 2:6"]
    assert await scene.step(MOVED) == ["announce 2:6 0:4"]


async def test_nothing_is_dropped_on_a_reading_made_before_our_word(scene: Scene) -> None:
    """Two nodes that each count on the other's record from before the other moved would uncover a block."""
    before_s = time.perf_counter()
    await scene.step(MOVED, COVER)
    assert await scene.step(MOVED, COVER, read_s=before_s) == []
    after_s = time.perf_counter()
    assert await scene.step(MOVED, COVER) == ["announce 2:6"]
    assert await scene.step(MOVED, COVER, read_s=after_s) == []
    assert scene.worker.sessions.ranges == (NEW, OLD)


async def test_left_out_it_stays_a_spare(scene: Scene) -> None:
    assert await scene.step(plan((OTHERS[0], OLD), (OTHERS[1], BlockRange(4, 8))), COVER) == []
    assert scene.worker.sessions.open_ranges == (OLD,)


async def test_a_plan_taken_back_leaves_it_where_it_was(scene: Scene) -> None:
    await scene.step(MOVED)
    back = plan((ME, OLD), (OTHERS[0], NEW), version=2)
    assert await scene.step(back) == ["announce 0:4 2:6"]
    await scene.step(back, record(OTHERS[0], NEW))
    await scene.step(back, record(OTHERS[0], NEW))
    assert scene.worker.sessions.ranges == (OLD,)


async def test_the_cache_is_shared_and_never_below_what_is_reserved(swarm: MemorySwarm) -> None:
    node = await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64)
    scene = Scene(node, room(usable=910))  # 110 beside both ranges: 27 tokens of 4 blocks
    await scene.step(MOVED)
    assert scene.worker.sessions.cache_tokens == 27
    await scene.step(MOVED, COVER)
    await scene.step(MOVED, COVER)
    assert scene.worker.sessions.ranges == (NEW,)
    assert scene.worker.sessions.cache_tokens == 64


async def test_where_both_do_not_fit_it_stays_until_others_hold_its_blocks(swarm: MemorySwarm) -> None:
    node = await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64)
    scene = Scene(node, room(usable=600))
    scene.open(BlockRange(0, 1))
    for _ in range(2):
        assert await scene.step(MOVED) == []
    assert scene.worker.sessions.open_ranges == (OLD,)
    assert await scene.step(MOVED, COVER) == ["announce "]  # no new sessions any more
    assert await scene.step(MOVED) == ["announce 0:4"]  # uncovered: again
    await scene.step(MOVED, COVER)
    assert await scene.step(MOVED, COVER) == []  # a session still runs
    scene.worker.sessions.close(SessionId(1), PeerId("client"))
    assert await scene.step(MOVED, COVER) == ["announce ", "load 2:6", "announce 2:6"]
    assert scene.worker.sessions.ranges == (NEW,)


async def test_it_follows_by_itself_and_outlives_a_failed_load(scene: Scene) -> None:
    failures = 1

    def load(blocks: BlockRange) -> Idler:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError("no such file")
        return scene.load(blocks)

    scene.mover._load = load
    task = asyncio.create_task(scene.mover.run())
    async with asyncio.timeout(5):
        while scene.worker.sessions.ranges != (NEW,):
            scene.mover.obey(MOVED, (COVER,), time.perf_counter())
            await asyncio.sleep(0.001)
    task.cancel()
    assert failures == 0


def test_room() -> None:
    plenty = room()
    assert plenty.cache_tokens([OLD]) == 64
    assert room(usable=500).cache_tokens([OLD]) == 25
    assert room(usable=499).cache_tokens([OLD]) is None
    assert room(usable=600).cache_tokens([OLD], reserved=51) is None
    assert plenty.plannable_bytes(25) == 1000
    assert plenty.plannable_bytes(0) == 800  # planners reckon with 100 bytes a block; it needs 125
    assert plenty.plannable_bytes(100) == 1000
