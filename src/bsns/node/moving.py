"""Moving: a node brings what it holds to what the plan in force says, and uncovers nothing on the way.

It loads its new range before it drops the old one, and serves both meanwhile. The old one takes no new sessions once
every block of it is held by nodes that the plan wants there, and is dropped when its last session has ended. Where both
do not fit the memory at once, the order is the other way round, but on the same condition; until it holds, the node
stays where it is. A node that the plan leaves out stays too: its range remains a spare that routes may use.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

import structlog

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.node.capacity import Room
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.plans import range_of, ranges_of
from bsns.swarm.records import MAX_OTHERS
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.worker.executor import Executor
from bsns.worker.service import Worker

log = structlog.get_logger(__name__)

DRAIN_S = 1.0
"""How often a node that waits for the last session on an old range looks again."""

Load = Callable[[BlockRange], Executor]
"""Loads a range and says how to compute it; takes seconds, and is called on a thread."""


class Mover:
    """Follows the plan in force, one step at a time. `run` is a task; `obey` tells it what has been seen."""

    def __init__(
        self,
        me: PeerId,
        worker: Worker,
        room: Room,
        load: Load,
        announce: Callable[[], Awaitable[None]],
        clock: Clock = MACHINE_CLOCK,
    ) -> None:
        """`announce` tells the directory what the worker holds now; it returns when that can be read there."""
        self._me = me
        self._clock = clock
        self._worker = worker
        self._room = room
        self._load = load
        self._announce = announce
        self._plan: PlanRecord | None = None
        self._records: Sequence[NodeRecord] = ()
        self._read_s = self._announced_s = -math.inf
        self._news = asyncio.Event()
        self._stuck: BlockRange | None = None
        self.moves = 0
        """Ranges loaded because a plan said so."""

    def obey(self, plan: PlanRecord | None, records: Sequence[NodeRecord], read_s: float) -> None:
        """The plan in force, if there is one, and the nodes that are here; `read_s` (monotonic): when reading began."""
        self._plan, self._records, self._read_s = plan, records, read_s
        self._news.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async with asyncio.timeout(DRAIN_S if len(self._worker.sessions.ranges) > 1 else None):
                    await self._news.wait()
            except TimeoutError:
                pass  # sessions may have ended meanwhile
            self._news.clear()
            try:
                await self.step()
            except BsnsError as error:
                log.warning("could not follow the plan; trying again", reason=error.message)
            except Exception:
                log.exception("could not follow the plan; trying again")

    async def step(self) -> None:
        """Take the next step towards the plan, if there is one to take."""
        plan = self._plan
        if plan is None or not plan.version:
            return
        sessions = self._worker.sessions
        target = range_of(plan, self._me)
        if target is not None and target not in sessions.ranges:
            await self._take_up(target)
            return
        kept = target or next(iter(sessions.ranges), None)
        if kept is None:
            return
        if sessions.open_ranges[:1] != (kept,):
            self._worker.prefer(kept)
            await self._tell()
            return
        for blocks in [held for held in sessions.ranges if held != kept]:
            await self._let_go(blocks, kept)

    async def _tell(self) -> None:
        await self._announce()
        self._announced_s = self._clock.now_s()

    async def _take_up(self, target: BlockRange) -> None:
        sessions = self._worker.sessions
        if len(sessions.ranges) > MAX_OTHERS:
            for blocks in sessions.ranges[1:]:
                await self._let_go(blocks)
            return
        promise = self._room.cache_tokens((*sessions.ranges, target), sessions.reserved)
        if promise is None:
            await self._make_way(target)
            if sessions.ranges:
                return
            promise = self._room.cache_tokens((target,), sessions.reserved)
            if promise is None:
                return  # whatever the plan says, it does not fit
        log.info("loading blocks for the plan", blocks=str(target), beside=[str(held) for held in sessions.ranges])
        promised = sessions.cache_tokens
        if sessions.ranges:  # before the load, which takes seconds in which sessions open
            sessions.resize(min(promise, promised))
        try:
            executor = await asyncio.to_thread(self._load, target)
        except BaseException:
            sessions.resize(promised)
            raise
        if not sessions.ranges:
            sessions.resize(promise)
        self._worker.take_on(executor)
        self.moves += 1
        self._stuck = None
        await self._tell()

    async def _make_way(self, target: BlockRange) -> None:
        """Drop what we hold to have room for the target, where others hold it as planned and no session runs on it."""
        sessions = self._worker.sessions
        if self._room.cache_tokens((target,)) is None or not all(self._covered(held) for held in sessions.ranges):
            if self._stuck != target:
                log.warning(
                    "staying with what we hold: the memory is too small for both, and nobody else holds it as planned",
                    held=[str(held) for held in sessions.ranges],
                    planned=str(target),
                )
            self._stuck = target
            for held in set(sessions.ranges) - set(sessions.open_ranges):
                sessions.reopen(held)
                await self._tell()
            return
        for held in sessions.ranges:
            await self._let_go(held)

    async def _let_go(self, blocks: BlockRange, kept: BlockRange | None = None) -> None:
        """One step towards dropping a range: announce it no more once it is covered, forget it once it is idle."""
        sessions = self._worker.sessions
        if self._read_s <= self._announced_s:
            return  # others may have looked at what we said before: nothing is dropped but on a reading made since
        if not self._covered(blocks, kept):
            if blocks not in sessions.open_ranges:
                sessions.reopen(blocks)
                await self._tell()
            return
        if blocks in sessions.open_ranges:
            sessions.drain(blocks)
            await self._tell()
        elif self._worker.drop(blocks):
            log.info("dropped blocks", blocks=str(blocks))
            if sessions.ranges:
                sessions.resize(self._room.cache_tokens(sessions.ranges) or sessions.cache_tokens)
            await self._tell()

    def _covered(self, blocks: BlockRange, kept: BlockRange | None = None) -> bool:
        """Whether every block is held by nodes that will keep it: those the plan wants there, and those it cannot move.

        A node's word that it serves a range is not enough: it may be about to drop that on ours.
        """
        assert self._plan is not None
        planned = ranges_of(self._plan)
        staying = [kept] if kept is not None else []
        for record in self._records:
            if record.peer == self._me or record.state != "serving":
                continue
            if not record.follows:
                staying.append(record.blocks)
            elif (there := planned.get(record.peer)) is not None:
                staying += [there] if any(held.covers(there) for held in record.ranges) else []
        return all(any(held.start <= block < held.end for held in staying) for block in blocks)
