"""The prober: measures a node's ways to the others, on streams of its own, as seldom as it may."""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from bsns.client.links import Link, Links
from bsns.core.errors import BsnsError, PeerFailed, PeerTimedOut
from bsns.core.ids import PeerId
from bsns.protocol.probing import MAX_PROBE_BYTES
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.allowances import Allowance
from bsns.swarm.bandwidth import Growth
from bsns.swarm.probing import LinkEstimator, differ, link_records, next_probes, watched
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.port import Dial

log = structlog.get_logger(__name__)

PINGS = 5
VISIT_S = 1.0
"""At most one peer is visited in this time, once all have been."""
FIRST_VISIT_S = 0.1
"""The same while there are peers that were never visited."""
LEAST_READ_S = 2.0
READ_SHARE = 0.02
"""The directory is read as often as this, and so seldom that reading takes no greater share of the time."""
READS = 5
"""What reading takes is the quickest of so many: a machine that was busy once says nothing of the directory."""
BUSY_SHARE = 0.01
BUSY_BURST_S = 1.0
"""How long probes may keep our links busy: the share, and the seconds at once."""
PATIENCE_S = 120.0
"""While the node computes nobody is measured whose figures are younger than this."""
PUBLISH_S = 4.0
"""How far apart records are at least that are published because links have changed."""
ANSWER_S = 2.0
PROBE_ANSWER_S = 5.0
ROUND_S = 8.0
"""One node may hold up the round, and with it all others, for no longer than this twice."""

_NOISE = os.urandom(MAX_PROBE_BYTES)
"""What probes carry: nothing on the way can make less of it."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One round: its pings in seconds; the bandwidth, if it could be measured; how long that kept the link busy."""

    round_trips_s: tuple[float, ...]
    bytes_per_s: float | None
    busy_s: float


async def measure(link: Link, *, bandwidth: bool, pings: int = PINGS, within_s: float = ROUND_S) -> Measurement:
    """Measure one way once; pings, and then probes, may take `within_s` each, however the node drags them out.

    Raises PeerTimedOut or PeerLost if it does not answer.
    """
    try:
        async with asyncio.timeout(within_s):
            await link.ping(ANSWER_S)  # wakes whatever sleeps on the way
            round_trips_s = tuple([await link.ping(ANSWER_S) for _ in range(pings)])
    except TimeoutError:
        raise PeerTimedOut(f"node {link.peer} took longer than {within_s:g} s over {pings + 1} pings") from None
    if not bandwidth:
        return Measurement(round_trips_s, None, 0.0)
    growth = Growth(min(round_trips_s))
    try:
        async with asyncio.timeout(within_s):
            while growth.size is not None:
                growth.took(await link.probe(memoryview(_NOISE)[: growth.size], PROBE_ANSWER_S))
    except (PeerFailed, TimeoutError):  # it takes no more probes for now
        return Measurement(round_trips_s, None, growth.busy_s)
    return Measurement(round_trips_s, growth.bytes_per_s, growth.busy_s)


class Prober:
    """A node's measuring: `run` is a task, `links` what it knows by now, `has_news` whether that ought to be told."""

    def __init__(
        self,
        own: PeerId,
        dial: Dial,
        records: Callable[[], Awaitable[Sequence[NodeRecord]]],
        *,
        busy: Callable[[], bool] = lambda: False,
        rng: np.random.Generator | None = None,
        clock: Clock = MACHINE_CLOCK,
    ) -> None:
        """`records` reads the swarm's nodes; `busy` says whether this node has better things to do."""
        self._own = own
        self._clock = clock
        self._links = Links(dial, lambda *_: None, lambda *_: None, lambda *_: None, clock)
        self._read = records
        self._busy = busy
        self._rng = rng or np.random.default_rng()
        self._records: dict[PeerId, NodeRecord] = {}
        self._neighbours: frozenset[PeerId] = frozenset()
        self._reads_s = deque([LEAST_READ_S * READ_SHARE], maxlen=READS)
        self._next_read_s = -math.inf
        self._estimates: dict[PeerId, LinkEstimator] = {}
        self._allowance = Allowance(BUSY_SHARE, BUSY_BURST_S)
        self._published: tuple[LinkRecord, ...] = ()
        self._published_s = -math.inf
        self.rounds = 0
        """Rounds measured so far."""

    def links(self) -> tuple[LinkRecord, ...]:
        """What is known, for the record, the most useful first."""
        return link_records(self._clock.now_s(), self._clock.unix_s(), self._estimates, self._neighbours)

    def published(self, links: Sequence[LinkRecord]) -> None:
        """These are in our record now."""
        self._published, self._published_s = tuple(links), self._clock.now_s()

    def has_news(self) -> bool:
        """Whether the links have changed so much since they were published that others would plan badly."""
        return self._clock.now_s() - self._published_s >= PUBLISH_S and differ(self._published, self.links())

    async def run(self) -> None:
        """Measure until cancelled."""
        try:
            while True:
                try:
                    await self.visit()
                except BsnsError as error:
                    log.info("could not read the directory; trying again", reason=error.message)
                except Exception:
                    log.exception("measuring failed; trying again")
                await asyncio.sleep(FIRST_VISIT_S if self._strangers() else VISIT_S)
        finally:
            await self._links.close()

    async def visit(self) -> PeerId | None:
        """Measure the peer that is most due, and say who it was. Raises what reading the directory raises."""
        now_s = self._clock.now_s()
        if now_s >= self._next_read_s:
            await self._look()
        peers = self._records.keys()
        due = next_probes(now_s, peers, self._estimates, self._rng, self._neighbours)
        if self._busy():
            due = [peer for peer in due if self._is_old(peer, now_s)]
        if not due:
            return None
        peer = due[0]
        estimate = self._estimates.setdefault(peer, LinkEstimator(now_s))
        try:
            link = await self._links.to(peer, self._records[peer].addresses)
            wanted = estimate.wants_bandwidth(now_s) and self._allowance.wait_s(0.0, now_s) == 0.0
            found = await measure(link, bandwidth=wanted)
        except BsnsError as error:
            log.info("a node does not answer our probes", peer=peer, reason=error.message)
            estimate.silent(self._clock.now_s())
        else:
            self.rounds += 1
            self._allowance.spend(found.busy_s, self._clock.now_s())
            estimate.answered(found.round_trips_s, found.bytes_per_s, self._clock.now_s())
        return peer

    async def _look(self) -> None:
        """Read who is here; forget who is not, or is not measured any more."""
        started_s = self._clock.now_s()
        try:
            records = await self._read()
        finally:
            self._reads_s.append(self._clock.now_s() - started_s)
            self._next_read_s = started_s + max(LEAST_READ_S, min(self._reads_s) / READ_SHARE)
        own = next((record for record in records if record.peer == self._own), None)
        there = [record for record in records if record.state == "serving"]  # others do not listen yet
        self._records = {record.peer: record for record in there if record.peer != self._own}
        self._neighbours = neighbours_of(own, records) if own is not None else frozenset()
        kept = set(watched(started_s, self._records.keys(), self._estimates, self._rng, self._neighbours))
        for peer in [peer for peer in self._estimates if peer not in kept]:
            del self._estimates[peer]
            await self._links.drop(peer)

    def _strangers(self) -> bool:
        return len(self._estimates) < len(self._records) and not self._estimates.keys() >= set(
            watched(self._clock.now_s(), self._records.keys(), self._estimates, self._rng, self._neighbours)
        )

    def _is_old(self, peer: PeerId, now_s: float) -> bool:
        estimate = self._estimates.get(peer)
        return estimate is None or (link := estimate.link(now_s)) is None or link.age_s >= PATIENCE_S


def neighbours_of(own: NodeRecord, records: Sequence[NodeRecord]) -> frozenset[PeerId]:
    """The nodes whose blocks come before or after ours: a route may go from them to us, or on to them."""
    starts = {blocks.start for blocks in own.ranges}
    ends = {blocks.end for blocks in own.ranges}
    return frozenset(
        record.peer
        for record in records
        if record.peer != own.peer and any(b.end in starts or b.start in ends for b in record.ranges)
    )
