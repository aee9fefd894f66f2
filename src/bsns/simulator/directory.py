"""The simulated directory: shelves that take a while to reach, and that a frozen or parted peer does not reach.

Nor does one whose clock is wrong: as in the real one (swarm.dht_guard), everybody refuses its requests, and it theirs.
It hears of nobody but itself then, or is told why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bsns.core.errors import NotAMember
from bsns.core.ids import PeerId
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.simulator.clock import OwnClock
from bsns.simulator.network import SimulatedNetwork
from bsns.swarm.directory import MemoryDirectory, Reading

LOOK_AGAIN_S = 0.25
SKEW_S = 60.0
"""How far a clock may be from the others' (swarm.dht_guard.MAX_CLOCK_SKEW_S, which cannot be had without torch)."""


class Shelf(MemoryDirectory):
    """A directory that is sorted again only when something has changed; readers share a reading."""

    def __init__(
        self,
        clock: Callable[[], float],
        shelf: dict[PeerId, NodeRecord] | None = None,
        plans: dict[PeerId, PlanRecord] | None = None,
        *,
        stale_s: float = 0.0,
    ) -> None:
        """A reading may be `stale_s` old."""
        super().__init__(shelf, clock, plans)
        self._now_s = clock
        self._reading = Reading()
        self._until_s = self._read_s = 0.0
        self._changed = True
        self._stale_s = stale_s

    def put(self, record: NodeRecord) -> None:
        self.shelf[record.peer] = record
        self._changed = True

    async def publish(self, record: NodeRecord) -> None:
        self.put(record)

    async def withdraw(self, record: NodeRecord) -> None:
        await super().withdraw(record)
        self._changed = True

    async def records(self) -> Reading:
        now_s = self._now_s()
        if now_s >= self._until_s or (self._changed and now_s >= self._read_s + self._stale_s):
            self._reading, self._read_s, self._changed = await super().records(), now_s, False
            self._until_s = min((record.expires_s for record in self._reading), default=0.0)
        return self._reading


class Shelves:
    """What has been announced, for each group of peers that hear of each other."""

    def __init__(self, network: SimulatedNetwork, clock: Callable[[], float], stale_s: float) -> None:
        self._stale_s = stale_s
        self.network = network
        self._clock = clock
        self._groups: dict[int, Shelf] = {0: Shelf(clock, stale_s=stale_s)}

    def of(self, peer: PeerId) -> Shelf:
        return self._groups[self.network.group_of(peer)]

    def plans(self) -> int:
        """How many plans have been published."""
        return sum(plan.version for plan in self._groups[0].plan_shelf.values())

    def part(self, peers: set[PeerId], group: int) -> None:
        """Cut peers off: they know what was announced so far."""
        main = self._groups[0]
        self._groups[group] = Shelf(self._clock, dict(main.shelf), dict(main.plan_shelf), stale_s=self._stale_s)
        self.network.part(peers, group)

    def heal(self, peers: set[PeerId], group: int) -> None:
        """Let them back: of everybody's announcements the newest are kept."""
        main, apart = self._groups[0], self._groups.pop(group)
        self.network.part(peers, 0)
        for peer in peers & apart.shelf.keys():
            main.put(apart.shelf[peer])
        for author in peers & apart.plan_shelf.keys():
            main.plan_shelf[author] = apart.plan_shelf[author]


class SimulatedDirectory:
    """One peer's way to the shelves (swarm.directory.Directory)."""

    def __init__(self, shelves: Shelves, peer: PeerId, clock: OwnClock, delay_s: float) -> None:
        self._shelves = shelves
        self._peer = peer
        self._clock = clock
        self._delay_s = delay_s
        self._own = MemoryDirectory(clock=clock.unix_s)
        self.gone = False
        """A process that is dead announces nothing more."""

    async def publish(self, record: NodeRecord) -> None:
        await self._reach()
        if not self.gone:
            await self._shelf().publish(record)

    async def withdraw(self, record: NodeRecord) -> None:
        if not self.gone:
            await self._shelf().withdraw(record)

    async def records(self) -> Reading:
        await self._reach()
        reading = await self._shelf().records()
        if self._clock.ahead_s <= 0:
            return reading
        now_s = self._clock.unix_s()
        return Reading(record for record in reading if record.expires_s > now_s)

    async def publish_plan(self, plan: PlanRecord) -> None:
        await self._reach()
        if not self.gone:
            await self._shelf().publish_plan(plan)

    async def plans(self) -> list[PlanRecord]:
        await self._reach()
        now_s = self._clock.unix_s()
        return [plan for plan in await self._shelf().plans() if plan.expires_s > now_s]

    async def close(self) -> None:
        self.gone = True

    def _shelf(self) -> MemoryDirectory:
        """The others' and ours; ours alone while our clock is ahead, for what we hold of theirs has expired by it.

        Raises NotAMember while it is behind: what we say has expired by anybody's clock but ours, and ours keeps the
        newest we said before.
        """
        skew_s = self._clock.ahead_s
        if abs(skew_s) <= SKEW_S:
            self._own = MemoryDirectory(clock=self._clock.unix_s)
            return self._shelves.of(self._peer)
        if skew_s > 0:
            return self._own
        raise NotAMember(f"refused: the clocks of {self._peer} and the others differ by {-skew_s:.0f} s")

    async def _reach(self) -> None:
        await asyncio.sleep(self._delay_s)
        while self._shelves.network.is_frozen(self._peer) and not self.gone:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(LOOK_AGAIN_S)
