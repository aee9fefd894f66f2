"""Who is here now, and how far away: a client's or a joining node's fresh enough view of the swarm."""

from __future__ import annotations

import asyncio
import math
import secrets
import statistics
import zlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bsns.client.links import Link, Links
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CacheFull, MissingBlocks
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link as Way
from bsns.core.snapshot import Snapshot
from bsns.protocol.inference import Description
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Knowledge, Route, Wish, best_chain, best_detour
from bsns.routing.grudges import Grudges
from bsns.routing.load import Loads
from bsns.routing.shortlist import shortlist
from bsns.swarm.directory import Directory
from bsns.swarm.snapshot import snapshot
from bsns.transport.clock import MACHINE_CLOCK, Clock

RECORDS_FRESH_S = 2.0
FRESH_S = 0.3
"""What is younger is not asked for again, even where it did not do."""
ROUND_TRIP_FRESH_S = 30.0
ROUND_TRIPS = 3
"""Of so many in a row the least counts: one that is taken while this client or the node is busy looks long, and routes
would take a detour for as long as it counts (as BBR's least round trip of a window, Cardwell et al. 2016)."""
PINGS = 3
PINGS_S = 0.05
"""So often a node is pinged, while that takes no longer: on short ways a ping that waits for a batch looks like a long
one, and routes would lead around it."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node's record and, if it answered just now, its present numbers and round trip."""

    record: NodeRecord
    now: Description | None
    round_trip_s: float | None
    error: str | None


class View:
    """The swarm's nodes (of one model, in one dtype), as the directory and our own pings show them.

    Whoever knows how many blocks the model has says so: a node that announces another number is no node of it.
    """

    def __init__(
        self,
        directory: Directory,
        model: ModelId | None = None,
        dtype: str | None = None,
        block_count: int | None = None,
        *,
        wish: Wish | None = None,
        clock: Clock = MACHINE_CLOCK,
        key: int | None = None,
    ) -> None:
        """`key`: by which this client's whims in a large swarm are drawn."""
        self._directory = directory
        self._clock = clock
        self._wish = wish
        self._wanted = (model, dtype, block_count)
        self._records: list[NodeRecord] = []
        self._missed: list[NodeRecord] = []
        """Nodes that the last reading did not show, and whose records have not expired."""
        self._read_s = -math.inf
        self._round_trips: dict[PeerId, _RoundTrips] = {}
        self._loads = Loads()
        self._grudges = Grudges()
        self._key = secrets.randbits(32) if key is None else key

    async def records(self) -> list[NodeRecord]:
        """The model's nodes, at most `RECORDS_FRESH_S` old."""
        if self._clock.now_s() - self._read_s >= RECORDS_FRESH_S:
            records = await self._directory.records()
            model, dtype, count = self._wanted
            before = (*self._records, *self._missed)
            self._records = [
                r
                for r in records
                if model in (None, r.model) and dtype in (None, r.dtype) and count in (None, r.block_count)
            ]
            here, now_s = {r.peer for r in self._records}, self._clock.unix_s()
            self._missed = [r for r in before if r.peer not in here and r.expires_s > now_s]
            self._loads.see(self._records)
            self._read_s = self._clock.now_s()
        return self._records

    def last_read(self) -> list[NodeRecord]:
        """The model's nodes, however long ago that was."""
        return self._records

    def snapshot(self) -> Snapshot:
        """The records last read, with our own round trips."""
        return snapshot(self._records, self._clock.unix_s(), self._ways())

    def _ways(self) -> dict[PeerId, Way]:
        """To those who have answered."""
        now_s = self._clock.now_s()
        return {
            peer: Way(min(trips.latest_s), age_s=now_s - trips.measured_s)
            for peer, trips in self._round_trips.items()
            if trips.latest_s
        }

    def bytes_per_s(self, sender: PeerId, receiver: PeerId) -> float | None:
        """How fast one node sends to another, as it has measured, or else the other; None where neither has."""
        for one, other in ((sender, receiver), (receiver, sender)):
            for record in self._records:
                if record.peer == one:
                    for link in record.links:
                        if link.peer == other and math.isfinite(link.bytes_per_s):
                            return link.bytes_per_s
        return None

    def round_trip_s(self, peer: PeerId) -> float | None:
        """Our own round trip to a node, the least of the latest; None where it has not answered the last time."""
        trips = self._round_trips.get(peer)
        return min(trips.latest_s) if trips is not None and trips.latest_s else None

    async def route(
        self,
        links: Links,
        needed_tokens: int,
        avoid: Collection[PeerId],
        blocks: BlockRange | None = None,
        fresh: bool = False,
    ) -> Route:
        """The chain that serves the wish best, with room for a session. Raises MissingBlocks, CacheFull.

        `fresh`: ask the directory again, for what is known is out of date. `blocks`: a chain over these only, in place
        of stages that were lost; of nodes that are known already, unless `fresh`.

        The session counts as open on its nodes until `release` is told that it has ended, or was not opened.
        """
        if fresh and self._clock.now_s() - self._read_s > FRESH_S:
            self._read_s = -math.inf
        if blocks is not None:
            if fresh or not self._records:
                await self.records()
            return self._best(blocks, needed_tokens, avoid)
        records = await self.records()
        if not records:
            raise MissingBlocks("no node of the swarm serves this model; start one with bsns serve MODEL --join INVITE")
        near = self._near(records, None, needed_tokens, {*avoid, *self._passed_over()})
        await self._measure(links, [record for record in near if record.peer not in avoid])
        return self._best(None, needed_tokens, avoid)

    def _passed_over(self) -> set[PeerId]:
        return self._grudges.passed_over(self._clock.now_s())

    def _near(
        self, records: Sequence[NodeRecord], blocks: BlockRange | None, needed_tokens: int, without: Collection[PeerId]
    ) -> list[NodeRecord]:
        """Those of the nodes that are worth asking (routing.shortlist)."""
        return shortlist(
            records,
            blocks or BlockRange(0, records[0].block_count),
            needed_tokens=needed_tokens,
            avoid=without,
            sessions=self.sessions(),
            round_trips_s={peer: way.round_trip_s for peer, way in self._ways().items()},
            silent=self._silent(),
            whim=self._whim,
        )

    def _silent(self) -> set[PeerId]:
        """Who did not answer when they were asked last."""
        return {peer for peer, trips in self._round_trips.items() if not trips.latest_s}

    def _whim(self, peer: PeerId) -> float:
        """A number in [0, 1) that is this client's own for a peer."""
        return zlib.crc32(peer.encode(), self._key) / 2**32

    def _best(self, blocks: BlockRange | None, needed_tokens: int, avoid: Collection[PeerId]) -> Route:
        """Without those that failed us lately, if there are others.

        Where nobody else is left, nodes that the directory showed before will do: a reading may miss the records that
        lay on a node which has just failed.
        """
        ways = self._ways()
        usual = Way(statistics.median(way.round_trip_s for way in ways.values())) if ways else None

        def choose(records: list[NodeRecord], without: Collection[PeerId]) -> Route:
            near = self._near(records, blocks, needed_tokens, without) if records else []
            # whom we have not asked is as far as others usually are, not nearer than all
            guessed = {} if usual is None else dict.fromkeys((record.peer for record in near), usual)
            seen = snapshot(near, self._clock.unix_s(), guessed | ways)
            known, wish = Knowledge(seen, self.sessions(), self._silent()), self._wish
            if blocks is not None:
                return best_detour(near, blocks, known, needed_tokens=needed_tokens, avoid=without, wish=wish)
            count = records[0].block_count
            return best_chain(near, count, known, needed_tokens=needed_tokens, avoid=without, wish=wish)

        passed_over = self._passed_over() - set(avoid)
        among = [(self._records, {*avoid, *passed_over})]
        if self._missed:
            among.append(([*self._records, *self._missed], {*avoid, *passed_over}))
        if passed_over:
            among.append(([*self._records, *self._missed], set(avoid)))
        refusal: BsnsError | None = None
        for records, without in among:
            try:
                route = choose(records, without)
            except (MissingBlocks, CacheFull) as error:
                refusal = refusal or error
            else:
                self._loads.add([hop.peer for hop in route])
                return route
        assert refusal is not None
        raise refusal

    def blame(self, peer: PeerId, error: BsnsError) -> None:
        """A peer failed one of our sessions: others are chosen for a while."""
        self._grudges.blame(peer, error, self._clock.now_s())

    def forgive(self, peers: Collection[PeerId]) -> None:
        """Pass these over no more."""
        self._grudges.forgive(peers)

    def release(self, route: Route) -> None:
        """A session on a route that `route` gave has ended."""
        self._loads.remove([hop.peer for hop in route])

    def claim(self, route: Route) -> None:
        """A session that was released is open on its nodes again."""
        self._loads.add([hop.peer for hop in route])

    def sessions(self) -> Mapping[PeerId, int]:
        """Open sessions by node: those that records tell of, and our own."""
        return self._loads.sessions()

    async def status(self, links: Links, deadline_s: float | None = None) -> list[NodeStatus]:
        """Every node's record beside what it answers now, if it does within `deadline_s`."""
        return list(await asyncio.gather(*(self._ask(links, record, deadline_s) for record in await self.records())))

    async def _ask(self, links: Links, record: NodeRecord, deadline_s: float | None) -> NodeStatus:
        try:
            async with asyncio.timeout(deadline_s):
                link = await links.to(record.peer, record.addresses)
                return NodeStatus(record, await link.describe(), await link.ping(), None)
        except BsnsError as error:
            return NodeStatus(record, None, None, error.message)
        except TimeoutError:
            return NodeStatus(record, None, None, f"node {record.peer} did not answer within {deadline_s:g} s")

    async def _measure(self, links: Links, records: list[NodeRecord]) -> None:
        """Ping the nodes whose round trip is unknown or old; one that does not answer is left for the route to find."""
        now_s = self._clock.now_s()
        known = self._round_trips
        due = [r for r in records if r.peer not in known or now_s - known[r.peer].measured_s > ROUND_TRIP_FRESH_S]

        async def ping(record: NodeRecord) -> None:
            try:
                rtt_s = await _quickest_s(await links.to(record.peer, record.addresses))
            except BsnsError:
                known[record.peer] = _RoundTrips(now_s)
            else:
                trips = known.setdefault(record.peer, _RoundTrips(now_s))
                trips.latest_s.append(rtt_s)
                trips.measured_s = now_s

        await asyncio.gather(*(ping(record) for record in due))


@dataclass(slots=True)
class _RoundTrips:
    """Our own to one node."""

    measured_s: float
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=ROUND_TRIPS))
    """Empty if it did not answer the last time."""


async def _quickest_s(link: Link) -> float:
    """A node's round trip: the least of several. Raises PeerTimedOut, PeerLost."""
    times_s = [await link.ping()]
    while len(times_s) < PINGS and sum(times_s) < PINGS_S:
        times_s.append(await link.ping())
    return min(times_s)
