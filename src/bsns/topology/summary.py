"""A swarm's shape in a few figures for people: its clusters, and its loops that last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bsns.core.ids import PeerId, short_names
from bsns.core.snapshot import Snapshot
from bsns.core.words import several
from bsns.topology.distance import Distances
from bsns.topology.persistence import Diagrams, Merge, clusters, merges

SEPARATE = 2.0
"""Clusters count as such if the way between them is at least this many times as long as the ways within."""
LASTING = 1.3
"""A loop counts if it closes at a distance at least this many times that at which it opened."""
VISIBLE = 0.05
"""And if it is open for at least this share of the longest step that joins the swarm: inside a LAN rings are noise."""
LEAST_S = 1e-6
MOST_NAMED = 8
"""Of each kind of thing, so many are told one by one."""


@dataclass(frozen=True, slots=True)
class Loop:
    """Nodes around a hole: at `opens_s` they form a ring, and only at `closes_s` ways across join them."""

    opens_s: float
    closes_s: float


@dataclass(frozen=True, slots=True)
class Summary:
    """`clusters` has one entry, all nodes, where none stand apart. Times for one token from node to node.

    `within_s` is the longest step that joins each cluster, `between_s` the shortest from one cluster to another, or
    `within_s` again where there is one cluster only.
    """

    clusters: tuple[tuple[PeerId, ...], ...]
    within_s: float
    between_s: float
    loops: tuple[Loop, ...]
    """The longest-lasting first."""
    brief_loops: int
    """Further loops, which close almost as soon as they open."""
    steps: tuple[tuple[float, int, int], ...]
    """(distance_s, clusters, loops open) at some distances, `within_s` among them."""


def summary(seen: Distances, diagrams: Diagrams, snapshot: Snapshot) -> Summary:
    """Reads `diagrams`, those of `seen` without weights, for people."""
    joined = merges(seen.matrix_MM)
    count = _separate(joined)
    within_s = joined[len(joined) - count].distance_s if joined and count <= len(joined) else 0.0
    between_s = joined[len(joined) - count + 1].distance_s if count > 1 else within_s
    groups = clusters(seen.matrix_MM, within_s)
    loops = sorted(
        (Loop(float(opens_s), float(closes_s)) for opens_s, closes_s in diagrams.h1),
        key=lambda loop: (-loop.closes_s / max(loop.opens_s, LEAST_S), loop.opens_s),
    )
    visible_s = VISIBLE * joined[-1].distance_s if joined else 0.0
    lasting = tuple(
        loop
        for loop in loops
        if loop.closes_s >= LASTING * max(loop.opens_s, LEAST_S) and loop.closes_s - loop.opens_s >= visible_s
    )
    return Summary(
        tuple(tuple(snapshot.nodes[seen.index_M[row]].peer for row in group) for group in groups),
        within_s,
        between_s,
        lasting,
        len(loops) - len(lasting),
        _steps(joined, diagrams, within_s),
    )


def clusters_in_words(told: Summary, hint: str = "") -> list[str]:
    """H0: how many clusters, how near within, how far between; `hint`: where to find those that are not named."""
    if len(told.clusters) == 1:
        return [f"no clusters stand apart: all are joined, step by step, by ways of up to {_ms(told.within_s)}"]
    lines = [
        f"{len(told.clusters)} clusters: steps of up to {_ms(told.within_s)} join each of them, "
        f"and from one to another it takes {_ms(told.between_s)} or more"
    ]
    called = short_names(peer for group in told.clusters for peer in group)
    for group in told.clusters[:MOST_NAMED]:
        names = ", ".join(called[peer] for peer in group[:MOST_NAMED])
        more = f" and {len(group) - MOST_NAMED} more" if len(group) > MOST_NAMED else ""
        lines.append(f"  {several(len(group), 'node')}: {names}{more}")
    if len(told.clusters) > MOST_NAMED:
        lines.append(f"  and {several(len(told.clusters) - MOST_NAMED, 'further cluster')}{hint}")
    return lines


def loops_in_words(told: Summary, hint: str = "") -> list[str]:
    """H1: rings of nodes with no short way across."""
    brief = several(told.brief_loops, "brief one")
    if not told.loops:
        return [f"no loops that last ({brief})" if told.brief_loops else "no loops"]
    rings = f"{several(len(told.loops), 'loop')}, with no short way across"
    lines = [rings + (f" (and {brief})" if told.brief_loops else "") + ":"]
    lines += [
        f"  from ways of {_ms(loop.opens_s)} on there is a ring, and only ways of {_ms(loop.closes_s)} lead across"
        for loop in told.loops[:MOST_NAMED]
    ]
    if len(told.loops) > MOST_NAMED:
        lines.append(f"  and {len(told.loops) - MOST_NAMED} more{hint}")
    return lines


def _separate(joined: list[Merge]) -> int:
    """How many clusters stand apart: the number after whose last merge the next one is farthest off, in proportion."""
    best, count = SEPARATE, 1
    for number in range(len(joined)):
        before_s = joined[number - 1].distance_s if number else LEAST_S
        ratio = joined[number].distance_s / max(before_s, LEAST_S)
        # A swarm of which no two nodes are near each other has no clusters, so the first merge does not count.
        if number and ratio > best:
            best, count = ratio, len(joined) + 1 - number
    return count


def _steps(
    joined: list[Merge], diagrams: Diagrams, within_s: float, rows: int = 6
) -> tuple[tuple[float, int, int], ...]:
    if not joined:
        return ()
    distances = np.array([merge.distance_s for merge in joined])
    spread = np.quantile(distances, np.linspace(0, 1, rows), method="nearest")
    at = np.unique([*spread, within_s])
    opens, closes = diagrams.h1.T
    return tuple(
        (float(d), len(joined) + 1 - int((distances <= d).sum()), int(((opens <= d) & (d < closes)).sum())) for d in at
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
