"""Small random graphs for tests, and slow twins of what planning computes fast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bsns.planning.graph import Fleet, OperatorGraph, part_costs, quotient_is_acyclic


def random_graph(rng: np.random.Generator, count: int, density: float = 0.3) -> OperatorGraph:
    """Edges between any two operators with this chance, names shuffled, log-normal figures with ties."""
    shuffled = rng.permutation(count)
    edges = [(shuffled[u], shuffled[v]) for v in range(count) for u in range(v) if rng.random() < density]
    figures = np.round(rng.lognormal(0, 0.8, (4, count)), 1)
    return OperatorGraph(
        tuple(f"op{v}" for v in range(count)),
        figures[0],
        figures[1],
        np.array(edges, dtype=np.intp).reshape(-1, 2),
        figures[2],
        figures[3],
    )


def chain(work: list[float], output: list[float]) -> OperatorGraph:
    """Operators in a row."""
    names = tuple("abcdefghij"[: len(work)])
    return OperatorGraph(
        names, np.array(work), np.array(output), np.array([(v, v + 1) for v in range(len(work) - 1)]).reshape(-1, 2)
    )


def every_partition(graph: OperatorGraph, parts: int) -> Iterator[tuple[int, ...]]:
    """Every partition into at most so many parts that can be computed one after another, by growing labels."""
    for labels in itertools.product(range(parts), repeat=graph.count):
        seen: list[int] = []
        for label in labels:
            if label not in seen:
                seen.append(label)
        if (
            seen == sorted(seen)
            and seen[0] == 0
            and seen == list(range(len(seen)))
            and quotient_is_acyclic(graph, labels)
        ):
            yield labels


def best_of_all(graph: OperatorGraph, fleet: Fleet) -> float:
    """The exact optimum, by looking at every partition."""
    return min(float(part_costs(graph, labels, fleet).max()) for labels in every_partition(graph, fleet.machines))


def plain_slice(cost_VV: NDArray[np.float64], machines: int) -> float:
    """The recurrence as it is written down: dp[b][r] = min over l of max(dp[b−1][l−1], f(l..r))."""
    count = len(cost_VV)
    before = [0.0] + [math.inf] * count
    best = math.inf
    for _ in range(machines):
        before = [math.inf] + [
            min(max(before[left], float(cost_VV[left, right])) for left in range(right + 1)) for right in range(count)
        ]
        best = min(best, before[-1])
    return best
