"""Probing: what a node knows of its ways to others, and whom it measures next. Pure: time and chance come in.

A way is measured in rounds: a few pings, and now and then probes of growing size (swarm.bandwidth). In a small swarm
every node measures its ways to all others; in a large one to MAX_LINKS of them: those that hold the blocks before and
after its own, the nearest it has found, and some drawn by lot, who are exchanged now and then, so that the nearest
become nearer. Times are seconds of any one clock that does not jump.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from bsns.core.ids import PeerId
from bsns.core.snapshot import Link
from bsns.protocol.records import LinkRecord
from bsns.swarm.records import MAX_LINKS

if TYPE_CHECKING:
    import numpy as np

ROUNDS = 8
BANDWIDTHS = 5
"""How many rounds and bandwidths a median is taken of."""
YOUNG_ROUNDS = 3
YOUNG_S = 3.0
REFRESH_S = 15.0
"""How long after a round the next one is due: for a way that has had few, and for one that is known."""
BANDWIDTH_S = 120.0
"""How old a bandwidth may become before it is measured again: that costs up to a megabyte, a few pings cost nothing."""
BACK_OFF_S = 2.0
MAX_BACK_OFF_S = 60.0
ROTATE_S = 300.0
"""How long a node drawn by lot is measured before another takes its place."""
SILENCES = 3
"""A node drawn by lot that did not answer so often has lost its place."""


class LinkEstimator:
    """What the last rounds say of one way, and when to try it next.

    Of a round's pings only the faster half counts: what makes the others slow, a batch that either end computes, is no
    property of the way. Medians let single bad rounds alone; two rounds in a row that agree with each other and lie
    far from all before are the new truth.
    """

    def __init__(self, now_s: float) -> None:
        self.known_since_s = now_s
        self.tried_s = -math.inf
        self.failures = 0
        """How often in a row it did not answer."""
        self._answered_s = -math.inf
        self._bandwidth_s = -math.inf
        self._rounds: deque[tuple[float, ...]] = deque(maxlen=ROUNDS)
        self._bytes_per_s: deque[float] = deque(maxlen=BANDWIDTHS)

    def answered(self, round_trips_s: Sequence[float], bytes_per_s: float | None, now_s: float) -> None:
        """Take a round: its pings (at least one), and its bandwidth, if that was measured."""
        self.tried_s = self._answered_s = now_s
        self.failures = 0
        self._rounds.append(tuple(sorted(round_trips_s)[: (len(round_trips_s) + 1) // 2]))
        if self._is_another():
            while len(self._rounds) > 2:
                self._rounds.popleft()
        if bytes_per_s is not None:
            self._bandwidth_s = now_s
            self._bytes_per_s.append(bytes_per_s)

    def silent(self, now_s: float) -> None:
        """It did not answer: what is known only grows older, and the next try is later each time."""
        self.tried_s = now_s
        self.failures += 1

    def link(self, now_s: float) -> Link | None:
        """The way as it is now known; an infinite bandwidth was not measured yet. None before the first answer."""
        if not self._rounds:
            return None
        pings = [ping for round_ in self._rounds for ping in round_]
        middle = statistics.median(pings)
        spread = statistics.median(abs(ping - middle) for ping in pings)
        bytes_per_s = statistics.median(self._bytes_per_s) if self._bytes_per_s else math.inf
        return Link(middle, bytes_per_s, spread, max(0.0, now_s - self._answered_s))

    @property
    def due_s(self) -> float:
        """When the next round is due."""
        if self.failures:
            return self.tried_s + min(MAX_BACK_OFF_S, BACK_OFF_S * 2.0 ** min(self.failures - 1, 16))
        return self.tried_s + (YOUNG_S if len(self._rounds) < YOUNG_ROUNDS else REFRESH_S)

    def wants_bandwidth(self, now_s: float) -> bool:
        """Whether the next round should measure the bandwidth too."""
        return len(self._bytes_per_s) < YOUNG_ROUNDS or now_s - self._bandwidth_s >= BANDWIDTH_S

    def _is_another(self) -> bool:
        if len(self._rounds) < 4:
            return False
        *before, last, newest = self._rounds
        pings = [ping for round_ in before for ping in round_]
        middle = statistics.median(pings)
        margin = max(4 * statistics.median(abs(ping - middle) for ping in pings), 0.2 * middle)
        shifts = [statistics.median(round_) - middle for round_ in (last, newest)]
        return min(shifts) > margin or max(shifts) < -margin


Estimates = Mapping[PeerId, LinkEstimator]


def next_probes(
    now_s: float,
    peers: Collection[PeerId],
    estimates: Estimates,
    rng: np.random.Generator,
    neighbours: Collection[PeerId] = (),
) -> list[PeerId]:
    """Which of `peers` are due for a round, the most urgent first: whoever is not known yet, neighbours before others.

    `neighbours` hold the blocks before or after our own.
    """
    due: list[tuple[tuple[bool, bool, float, float], PeerId]] = []
    for peer in watched(now_s, peers, estimates, rng, neighbours):
        estimate = estimates.get(peer)
        due_s = estimate.due_s if estimate is not None else -math.inf
        if due_s <= now_s:
            urgency = (estimate is not None, peer not in neighbours, due_s, float(rng.random()))
            due.append((urgency, peer))
    return [peer for _, peer in sorted(due)]


def watched(
    now_s: float,
    peers: Collection[PeerId],
    estimates: Estimates,
    rng: np.random.Generator,
    neighbours: Collection[PeerId] = (),
) -> list[PeerId]:
    """The peers whose ways are measured: all, or MAX_LINKS of them."""
    if len(peers) <= MAX_LINKS:
        return sorted(peers)
    beside = sorted(set(peers) & set(neighbours), key=lambda peer: (peer not in estimates, peer))
    chosen = beside[: MAX_LINKS // 2]
    trips_s = {
        peer: link.round_trip_s
        for peer in peers
        if (estimate := estimates.get(peer)) is not None
        and estimate.failures < SILENCES
        and (link := estimate.link(now_s)) is not None
    }
    nearest = sorted(trips_s.keys() - set(chosen), key=lambda peer: (trips_s[peer], peer))
    chosen += nearest[: MAX_LINKS // 3]
    drawn = [
        peer
        for peer in set(peers) - set(chosen)
        if (estimate := estimates.get(peer)) is not None
        and estimate.failures < SILENCES
        and now_s - estimate.known_since_s < ROTATE_S
    ]
    drawn.sort(key=lambda peer: (estimates[peer].known_since_s, peer))
    chosen += drawn[: MAX_LINKS - len(chosen)]
    strangers = sorted(set(peers) - set(chosen) - estimates.keys())
    free = min(MAX_LINKS - len(chosen), len(strangers))
    return (
        chosen + [strangers[number] for number in rng.choice(len(strangers), free, replace=False)] if free else chosen
    )


def link_records(
    now_s: float, unix_s: float, estimates: Estimates, neighbours: Collection[PeerId] = ()
) -> tuple[LinkRecord, ...]:
    """What is known, as a node's record carries it, at most MAX_LINKS: neighbours first, then from near to far."""
    known = [(peer, link) for peer, estimate in estimates.items() if (link := estimate.link(now_s)) is not None]
    known.sort(key=lambda entry: (entry[0] not in neighbours, entry[1].round_trip_s, entry[0]))
    return tuple(
        LinkRecord(peer, link.round_trip_s, link.spread_s, link.bytes_per_s, unix_s - link.age_s)
        for peer, link in known[:MAX_LINKS]
    )


def differ(published: Sequence[LinkRecord], present: Sequence[LinkRecord]) -> bool:
    """Whether whoever plans with what is published would go wrong: another set of ways, or quite another figure."""
    before = {link.peer: link for link in published}
    if before.keys() != {link.peer for link in present}:
        return True
    return any(_differs(before[link.peer], link) for link in present)


def _differs(before: LinkRecord, now: LinkRecord) -> bool:
    margin_s = max(0.25 * before.round_trip_s, 2 * before.spread_s, 0.0005)
    if abs(now.round_trip_s - before.round_trip_s) > margin_s:
        return True
    slow, fast = sorted((before.bytes_per_s, now.bytes_per_s))
    return fast != slow and fast > 2 * slow
