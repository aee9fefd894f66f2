"""Loads that fail: a node keeps what it holds, says why once, tries again after a while, and never stays empty."""

from __future__ import annotations

import asyncio
import errno
import math
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from memory_swarm import MemorySwarm, StageShelf, answer, until
from structlog.testing import capture_logs
from test_moving import BLOCKS, COVER, ME, MOVED, NEW, OLD, OTHERS, Idler, Scene, plan, record, room

from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CorruptModel, DiskFull, NotEnoughMemory, PeerFailed
from bsns.model.stage import Stage
from bsns.node.capacity import Room
from bsns.node.moving import MOST_RETRY_S, RETRY_S, Mover
from bsns.node.server import _renewed
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.worker.torch_executor import TorchExecutor

ERRORS = [
    CorruptModel("the file is damaged; fetch it again"),
    DiskFull("the disk is full; free some of it"),
    NotEnoughMemory("there is no memory left; free some"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
]


class Trouble(Scene):
    """A node on a clock of the test's own, some of whose ranges cannot be loaded."""

    def __init__(self, node: Any, room: Room, error: Exception = ERRORS[0]) -> None:
        super().__init__(node, room)
        self.broken: set[BlockRange] = {NEW}
        self.deaf = False
        self.error = error
        self.time_s = 0.0
        self.mover = Mover(self.me, node.worker, room, self.load, self.announce, self)

    def now_s(self) -> float:
        return self.time_s

    def unix_s(self) -> float:
        return self.time_s

    def load(self, blocks: BlockRange) -> Idler:
        loaded = super().load(blocks)
        if blocks in self.broken:
            raise self.error
        return loaded

    async def announce(self) -> None:
        if self.deaf:
            raise PeerFailed("nobody took our record")
        await super().announce()

    async def turn(self, plan: PlanRecord | None, *records: NodeRecord) -> list[str]:
        """A second later."""
        self.time_s += 1.0
        return await self.step(plan, *records, read_s=self.time_s)

    async def turns(self, seconds: int, plan: PlanRecord | None, *records: NodeRecord) -> list[tuple[float, str]]:
        """What was done when."""
        return [(self.time_s, did) for _ in range(seconds) for did in await self.turn(plan, *records)]

    @property
    def record(self) -> NodeRecord:
        """What it would say of itself."""
        return _renewed(record(ME, OLD), self.worker, self.time_s, self.mover.coming)


@pytest.fixture
async def trouble(swarm: MemorySwarm) -> Trouble:
    return Trouble(await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64), room())


@pytest.fixture
async def narrow(swarm: MemorySwarm) -> Trouble:
    """Where both ranges do not fit at once."""
    return Trouble(await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64), room(usable=600))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_it_keeps_what_it_holds_and_says_why_once(swarm: MemorySwarm, error: Exception) -> None:
    node = await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64)
    trouble = Trouble(node, room(usable=910), error)  # 110 beside both ranges: 27 tokens of 4 blocks
    trouble.open(OLD)
    with capture_logs() as said:
        did = await trouble.turns(120, MOVED, COVER)
    assert {what for _, what in did} == {"load 2:6"}
    assert trouble.worker.sessions.open_ranges == (OLD,)
    assert trouble.worker.sessions.cache_tokens == 64
    assert len(trouble.worker.sessions) == 1
    (warning,) = [entry for entry in said if entry["log_level"] == "warning"]
    assert (warning["blocks"], warning["held"]) == ("2:6", ["0:4"])
    assert str(error) in warning["reason"]
    assert (warning["exc_info"] is None) == isinstance(error, BsnsError)


async def test_it_tries_again_ever_more_seldom_and_goes_when_it_can(trouble: Trouble) -> None:
    did = await trouble.turns(1200, MOVED, COVER)
    tries = [at_s for at_s, what in did if what == "load 2:6"]
    waits = [after - before for before, after in pairwise(tries)]
    assert waits[0] == RETRY_S
    assert waits == sorted(waits)
    assert waits[-1] == MOST_RETRY_S
    trouble.broken.clear()
    await trouble.turns(int(MOST_RETRY_S) + 3, MOVED, COVER)
    assert trouble.worker.sessions.ranges == (NEW,)
    assert trouble.mover.moves == 1


async def test_another_reason_is_told_and_another_range_is_not_waited_for(swarm: MemorySwarm) -> None:
    node = await swarm.add_node("me", Idler(OLD), block_count=BLOCKS, cache_tokens=64)
    trouble = Trouble(node, room(usable=2000))
    await trouble.turn(MOVED, COVER)
    elsewhere = BlockRange(4, 8)
    assert "load 4:8" in await trouble.turn(plan((ME, elsewhere), (OTHERS[0], OLD), version=2), COVER)
    assert trouble.worker.sessions.ranges == (elsewhere, OLD)
    trouble.error = DiskFull("the disk is full; free some of it")
    with capture_logs() as said:
        await trouble.turns(10, MOVED, COVER)
    assert [entry["reason"] for entry in said if entry["log_level"] == "warning"] == [str(trouble.error)]


async def test_while_it_waits_what_drains_is_served_again_if_others_have_gone(trouble: Trouble) -> None:
    third = BlockRange(4, 8)
    trouble.broken = {third}
    trouble.open(OLD)
    await trouble.turns(3, MOVED, COVER)
    assert trouble.worker.sessions.open_ranges == (NEW,)
    onward = plan((ME, third), (OTHERS[0], NEW), version=2)
    await trouble.turns(3, onward, record(OTHERS[0], NEW))
    assert trouble.worker.sessions.open_ranges == (NEW, OLD)


async def test_what_it_had_to_drop_it_loads_again(narrow: Trouble) -> None:
    did = await narrow.turns(3, MOVED, COVER)
    assert [what for _, what in did] == [
        *("announce ", "announce ", "load 2:6"),
        *("announce ", "load 0:4", "announce 0:4"),
    ]
    assert narrow.worker.sessions.open_ranges == (OLD,)
    assert narrow.worker.sessions.cache_tokens == 50
    assert (narrow.record.state, narrow.record.blocks) == ("serving", OLD)
    narrow.broken.clear()
    await narrow.turns(20, MOVED, COVER)
    assert narrow.worker.sessions.ranges == (NEW,)


@pytest.mark.parametrize("in_force", [MOVED, plan((OTHERS[0], OLD)), None])
async def test_a_node_that_can_load_nothing_says_so_and_loads_what_it_can_later(
    narrow: Trouble, in_force: PlanRecord | None
) -> None:
    narrow.broken = {OLD, NEW}
    with capture_logs() as said:
        await narrow.turns(10, MOVED, COVER)
    assert narrow.worker.sessions.ranges == ()
    assert (narrow.record.state, narrow.record.others) == ("joining", ())
    assert narrow.record.blocks == narrow.mover.coming
    assert len([entry for entry in said if entry["log_level"] == "warning"]) == 2  # of each range
    narrow.broken.remove(OLD)
    await narrow.turns(20, in_force, COVER)
    assert narrow.worker.sessions.ranges == (OLD,)


async def test_a_plan_for_more_than_fits_leaves_it_with_what_it_held(narrow: Trouble) -> None:
    narrow.broken = {OLD, NEW}
    await narrow.turns(3, MOVED, COVER)
    assert narrow.worker.sessions.ranges == ()
    narrow.broken.clear()
    await narrow.turns(20, plan((ME, BlockRange(0, 8)), version=2), COVER)
    assert narrow.worker.sessions.ranges == (OLD,)


async def test_nothing_is_dropped_while_nobody_hears_what_it_says(trouble: Trouble) -> None:
    """Whoever does not know that it drains counts on it still."""
    trouble.broken.clear()
    await trouble.turn(MOVED)
    trouble.deaf = True
    with pytest.raises(PeerFailed):
        await trouble.turn(MOVED, COVER)
    for _ in range(3):
        with pytest.raises(PeerFailed):
            await trouble.turn(MOVED, COVER)
    assert trouble.worker.sessions.ranges == (NEW, OLD)
    trouble.deaf = False
    await trouble.turns(3, MOVED, COVER)
    assert trouble.worker.sessions.ranges == (NEW,)


async def test_trouble_is_told_once_however_often_it_comes(trouble: Trouble) -> None:
    trouble.broken.clear()
    trouble.deaf = True
    with capture_logs() as said:
        task = asyncio.create_task(trouble.mover.run())

        def told() -> list[str]:
            trouble.mover.obey(MOVED, (COVER,), math.inf)
            return [entry["reason"] for entry in said if entry["log_level"] == "warning"]

        await until(lambda: bool(told()))
        for _ in range(20):
            assert told() == ["nobody took our record"]
            await asyncio.sleep(0.005)
        task.cancel()
    assert told() == ["nobody took our record"]


async def test_a_truncated_file_is_waited_for_while_answers_go_on(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    file = path / "model.safetensors"
    whole = file.read_bytes()
    old, new, rest = BlockRange(0, 2), BlockRange(0, 3), BlockRange(2, 5)

    def load(blocks: BlockRange) -> TorchExecutor:
        return TorchExecutor(Stage(path, blocks, dtype="float32"), dtype="float32")

    node = await swarm.add_node("me", load(old), block_count=5)
    await swarm.add_node("other", load(rest), block_count=5)
    ends = shelf.ends(tiny_model("llama"))
    prompt, options = [3, 5, 7], SamplingOptions(max_tokens=12)
    expected = await answer(swarm.client(ends), prompt, options)
    file.write_bytes(whole[:-1000])
    clock = SimpleNamespace(now_s=lambda: 0.0, unix_s=lambda: 0.0)

    async def announce() -> None: ...

    mover = Mover(ME, node.worker, room(usable=10_000), load, announce, clock)
    order = msgspec.structs.replace(plan((ME, new)), block_count=5)
    records: Sequence[NodeRecord] = ()
    with capture_logs() as said:
        mover.obey(order, records, 0.0)
        step = asyncio.create_task(mover.step())
        assert await answer(swarm.client(ends), prompt, options) == expected
        await step
    assert node.worker.sessions.ranges == (old,)
    (warning,) = [entry for entry in said if entry["log_level"] == "warning"]
    assert str(path) in warning["reason"]
    assert "fetch it again" in warning["reason"]
    file.write_bytes(whole)
    await mover.step()
    assert node.worker.sessions.ranges == (old,), "it did not wait"
    clock.now_s = lambda: RETRY_S
    await mover.step()
    assert node.worker.sessions.ranges[0] == new
    assert await answer(swarm.client(ends), prompt, options) == expected
