"""Moving: a node brings what it holds to what the plan in force says, and uncovers nothing on the way.

It loads its new range before it drops the old one, and serves both meanwhile. The old one takes no new sessions once
every block of it is held by nodes that the plan wants there, and is dropped when its last session has ended. Where both
do not fit the memory at once, the order is the other way round, but on the same condition; until it holds, the node
stays where it is. A node that the plan leaves out stays too: its range remains a spare that routes may use.

Where a range cannot be loaded, the node keeps what it holds, and tries again after a while, which doubles each time. If
it had to drop what it held, it loads that again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, NotEnoughMemory
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
"""How often a node that waits for the last session on an old range, or to load once more, looks again."""
RETRY_S = 2.0
MOST_RETRY_S = 300.0
"""How long a node waits before it loads a range again that could not be loaded: at first, and at most."""

Load = Callable[[BlockRange], Executor]
"""Loads a range and says how to compute it; takes seconds, and is called on a thread. Raises what reading raises."""


@dataclass(frozen=True, slots=True)
class Setback:
    """Why a range could not be loaded."""

    reason: str
    wait_s: float
    again_s: float
    """When to try again, on the monotonic clock."""


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
        self._setbacks: dict[BlockRange, Setback] = {}
        self._trouble = ""
        self._dropped: BlockRange | None = None
        self.coming: BlockRange | None = None
        """What it is to hold next, while it takes no sessions."""
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
                waits = len(self._worker.sessions.ranges) != 1 or self._setbacks
                async with asyncio.timeout(DRAIN_S if waits else None):
                    await self._news.wait()
            except TimeoutError:
                pass  # sessions may have ended meanwhile
            self._news.clear()
            try:
                await self.step()
                self._trouble = ""
            except BsnsError as error:
                self._tell_trouble(error.message)
            except Exception as error:  # noqa: BLE001  a node that no longer follows would be lost to planning
                self._tell_trouble(repr(error), error)

    async def step(self) -> None:
        """Take the next step towards the plan, if there is one to take."""
        sessions = self._worker.sessions
        if self._announced_s == math.inf:
            await self._tell()
        plan = self._plan if self._plan is not None and self._plan.version else None
        target = range_of(plan, self._me) if plan is not None else None
        # whatever the plan says: a node that holds nothing is of use to nobody
        wanted = (target,) if sessions.ranges else (target, self._dropped)
        for blocks in wanted:
            if blocks is not None and blocks not in sessions.ranges and not self._rests(blocks):
                await self._take_up(blocks)
                return
        kept = target if target in sessions.ranges else next(iter(sessions.ranges), None)
        if plan is None or kept is None:
            return
        if sessions.open_ranges[:1] != (kept,):
            self._worker.prefer(kept)
            await self._tell()
            return
        for blocks in [held for held in sessions.ranges if held != kept]:
            await self._let_go(blocks, kept)

    async def _tell(self) -> None:
        self._announced_s = math.inf  # until it is heard nothing is dropped: others count on what we said before
        await self._announce()
        self._announced_s = self._clock.now_s()

    def _tell_trouble(self, reason: str, unforeseen: Exception | None = None) -> None:
        """Log a failure once, not at every step."""
        if reason != self._trouble:
            log.warning("could not follow the plan; trying again", reason=reason, exc_info=unforeseen)
        self._trouble = reason

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
            if promise is None:  # whatever the plan says
                self._set_back(target, NotEnoughMemory(f"blocks {target} do not fit the memory beside their cache"))
                return
        if not sessions.ranges and self.coming != target:
            self.coming = target
            await self._tell()
        log.info("loading blocks for the plan", blocks=str(target), beside=[str(held) for held in sessions.ranges])
        promised = sessions.cache_tokens
        if sessions.ranges:  # before the load, which takes seconds in which sessions open
            sessions.resize(min(promise, promised))
        try:
            executor = await asyncio.to_thread(self._load, target)
        except Exception as error:  # noqa: BLE001  a file, a disk, the memory, a library: the node goes on
            sessions.resize(promised)
            self._set_back(target, error)
            return
        except BaseException:
            sessions.resize(promised)
            raise
        if not sessions.ranges:
            sessions.resize(promise)
        self._worker.take_on(executor)
        self.moves += 1
        self._stuck = self.coming = None
        self._setbacks.pop(target, None)
        await self._tell()

    def _rests(self, blocks: BlockRange) -> bool:
        """Whether it is too early to load a range again that could not be loaded."""
        known = self._setbacks.get(blocks)
        return known is not None and self._clock.now_s() < known.again_s

    def _set_back(self, blocks: BlockRange, error: Exception) -> None:
        """Wait before the range is loaded again, longer each time; say so once for each reason."""
        known, typed = self._setbacks.get(blocks), isinstance(error, BsnsError)
        reason = str(error) if typed else f"{type(error).__name__}: {error}"
        if known is None or known.reason != reason:
            log.warning(
                "could not load blocks; going on with what is held, and trying again",
                blocks=str(blocks),
                held=[str(held) for held in self._worker.sessions.ranges],
                reason=reason,
                exc_info=None if typed else error,
            )
        wait_s = min(MOST_RETRY_S, 2 * known.wait_s) if known is not None else RETRY_S
        self._setbacks[blocks] = Setback(reason, wait_s, self._clock.now_s() + wait_s)
        self._news.set()  # where nothing is held now, what was held before is loaded next

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
        self.coming = target
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
            self._dropped = blocks
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
