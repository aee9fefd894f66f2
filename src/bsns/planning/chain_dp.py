"""The best cut of the blocks for a given order of nodes, any of which may be skipped: exact, by dynamic programming.

SliceGraph of MTPP (Archer et al., arXiv 2311.03703) for unequal nodes and links. Two questions suffice for every
objective: how far can nodes get when no stage may take longer than T, and what is the least latency under that limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsns.core.plan import Objective
from bsns.planning.problem import Chain, ChainProblem, Floats, Stage

Ints = NDArray[np.int64]

TOLERANCE = 1e-12
"""Relative: below it, two sums of the same figures may differ by rounding alone."""
_NOTHING = -1


@dataclass(frozen=True, slots=True)
class Ruler:
    """Sums over ranges of blocks, for questions such as how far a node gets from a block on. M = L + 1 boundaries."""

    work_M: Floats
    bytes_M: Floats

    @classmethod
    def of(cls, problem: ChainProblem) -> Ruler:
        return cls(_sums(problem.work_L), _sums(problem.bytes_L))

    def farthest(self, start: Ints, seconds: Floats, time: Floats, memory: Floats) -> Ints:
        """The last boundary that a node reaches from `start` within `seconds` of computing and its memory; all alike
        in shape."""
        budget = self.work_M[start] + np.maximum(seconds, -1.0) / time
        by_time = np.searchsorted(self.work_M, budget + TOLERANCE * np.abs(budget), side="right") - 1
        by_memory = np.searchsorted(self.bytes_M, self.bytes_M[start] + memory, side="right") - 1
        return np.minimum(by_time, by_memory)

    def first(self, seconds: Floats, time: Floats, memory: float) -> Ints:
        """(K, M) The first boundary from which a node reaches each boundary, for each of K limits of `seconds`."""
        need = self.work_M - seconds[:, None] / time
        by_time = np.searchsorted(self.work_M, need - TOLERANCE * np.abs(need), side="left")
        by_memory = np.searchsorted(self.bytes_M, self.bytes_M - memory, side="left")
        return np.maximum(by_time, by_memory)


def best_cut(problem: ChainProblem, order: Sequence[int], objective: Objective, *, slack: float = 0.0) -> Chain | None:
    """The chain of least value among those whose nodes stand in this order; None if none has enough memory.

    Exact; with `slack`, a mixed objective's value may be above the least by that share, which is faster.
    """
    if objective.latency == 0:
        return least_bottleneck(problem, order)
    fastest = least_latency(problem, order)
    if fastest is None or objective.bottleneck == 0:
        return fastest
    return _least_mixture(problem, order, objective, fastest, max(slack, TOLERANCE))


def least_bottleneck(problem: ChainProblem, order: Sequence[int], below_s: float = math.inf) -> Chain | None:
    """The chain in this order with the least bottleneck; None if none is below `below_s`.

    Bisection on the bottleneck; each chain found lowers the upper end to what it really costs, so the end is exact.
    """
    ruler = Ruler.of(problem)
    nodes = np.asarray(order, dtype=np.int64)
    limit_s = below_s * (1 - TOLERANCE) if math.isfinite(below_s) else math.inf
    best = _far_reach(problem, ruler, nodes, limit_s) or _any_reach(problem, ruler, nodes, limit_s)
    if best is None:
        return None
    low_s, high_s = 0.0, problem.cost(best)[0]
    while high_s - low_s > 1e-9 * high_s:  # the quick way first: what it finds is right, what it misses may be there
        middle_s = (low_s + high_s) / 2
        chain = _far_reach(problem, ruler, nodes, middle_s)
        if chain is None:
            low_s = middle_s
        else:
            best, high_s = chain, min(problem.cost(chain)[0], middle_s)
    low_s, middle_s = 0.0, high_s * (1 - 2 * TOLERANCE)
    while high_s - low_s > 4 * TOLERANCE * high_s:
        chain = _far_reach(problem, ruler, nodes, middle_s) or _any_reach(problem, ruler, nodes, middle_s)
        if chain is None:
            low_s = middle_s
        else:
            best, high_s = chain, min(problem.cost(chain)[0], middle_s)
        middle_s = (low_s + high_s) / 2 if high_s - low_s > 1e-6 * high_s else high_s * (1 - 2 * TOLERANCE)
    return best


def _far_reach(problem: ChainProblem, ruler: Ruler, nodes: Ints, limit_s: float) -> Chain | None:
    """A chain in this order none of whose turns takes longer than `limit_s`, if one is found quickly.

    Getting farther hardly ever hurts what comes later, so each node keeps only the farthest boundary it can reach as
    the last; one whose way back to the client is too slow leaves the last block to another.
    """
    goal = problem.block_count
    reached_K = np.zeros(len(nodes) + 1, dtype=np.int64)  # of the client, then of each node in order
    before_K = np.full(len(nodes) + 1, _NOTHING)
    usable_K = np.zeros(len(nodes) + 1, dtype=bool)
    usable_K[0] = True
    may_end_N = problem.exit_N + problem.client_s <= limit_s * (1 + TOLERANCE)
    for place, node in enumerate(nodes, start=1):
        ways_K = np.concatenate([[problem.entry_N[node]], problem.hop_NN[nodes[: place - 1], node]])
        spare_K = np.where(usable_K[:place], limit_s - ways_K, -1.0)
        starts_K = reached_K[:place]
        ends_K = ruler.farthest(starts_K, spare_K, problem.time_N[node], problem.memory_N[node])
        ends_K = np.where(usable_K[:place] & (spare_K >= 0), ends_K, _NOTHING)
        if not may_end_N[node]:
            ends_K = np.minimum(ends_K, goal - 1)
        ends_K = np.where(ends_K > starts_K, ends_K, _NOTHING)
        best = int(ends_K.argmax())
        if ends_K[best] == _NOTHING:
            continue
        reached_K[place], before_K[place], usable_K[place] = ends_K[best], best, True
        if ends_K[best] == goal:
            return _walk_back(nodes, reached_K, before_K, place)
    return None


def _any_reach(problem: ChainProblem, ruler: Ruler, nodes: Ints, limit_s: float) -> Chain | None:
    """As `_far_reach`, but sure: every boundary that a node can reach as the last is kept.

    Stopping early can pay where the next node cannot take the block that would follow but lies on a better way.
    """
    size = problem.block_count + 1
    may_end_N = problem.exit_N + problem.client_s <= limit_s * (1 + TOLERANCE)
    reached_KM = np.zeros((len(nodes) + 1, size), dtype=bool)
    reached_KM[0, 0] = True
    boundaries_M = np.arange(size)
    for place, node in enumerate(nodes, start=1):
        ways_K = np.concatenate([[problem.entry_N[node]], problem.hop_NN[nodes[: place - 1], node]])
        spare_K = limit_s - ways_K
        ends_KM = ruler.farthest(boundaries_M[None], spare_K[:, None], problem.time_N[node], problem.memory_N[node])
        ends_KM = np.where(reached_KM[:place] & (spare_K[:, None] >= 0), ends_KM, _NOTHING)
        farthest_M = np.maximum.accumulate(ends_KM.max(axis=0))
        reached_KM[place, 1:] = farthest_M[:-1] >= boundaries_M[1:]
        reached_KM[place, -1] &= may_end_N[node]
        if reached_KM[place, -1]:
            return _retrace(problem, ruler, nodes, reached_KM, place, limit_s)
    return None


def _retrace(
    problem: ChainProblem, ruler: Ruler, nodes: Ints, reached_KM: NDArray[np.bool_], place: int, limit_s: float
) -> Chain:
    stages: list[Stage] = []
    end = problem.block_count
    boundaries_M = np.arange(problem.block_count + 1)
    while place > 0:
        node = int(nodes[place - 1])
        ways_K = np.concatenate([[problem.entry_N[node]], problem.hop_NN[nodes[: place - 1], node]])
        spare_K = (limit_s - ways_K)[:, None]
        ends_KM = ruler.farthest(boundaries_M[None], spare_K, problem.time_N[node], problem.memory_N[node])
        before, starts = np.nonzero(reached_KM[:place] & (spare_K >= 0) & (ends_KM >= end) & (boundaries_M < end))
        place, start = int(before[0]), int(starts[0])
        stages.append(Stage(node, start, end))
        end = start
    return tuple(reversed(stages))


def _walk_back(nodes: Ints, reached_K: Ints, before_K: Ints, place: int) -> Chain:
    stages: list[Stage] = []
    while place > 0:
        before = int(before_K[place])
        stages.append(Stage(int(nodes[place - 1]), int(reached_K[before]), int(reached_K[place])))
        place = before
    return tuple(reversed(stages))


def least_latency(problem: ChainProblem, order: Sequence[int], limit_s: float = math.inf) -> Chain | None:
    """The chain in this order with the least latency among those whose bottleneck is at most `limit_s`."""
    ruler = Ruler.of(problem)
    nodes = np.asarray(order, dtype=np.int64)
    limit_s *= 1 + TOLERANCE
    if limit_s < problem.client_s:
        return None
    count, size = len(nodes), problem.block_count + 1
    cost_KM = np.full((count + 1, size), math.inf)
    cost_KM[0, 0] = 0.0
    before_KM = np.full((count + 1, size), _NOTHING)
    start_KM = np.full((count + 1, size), _NOTHING)
    boundaries_M = np.arange(size)
    for place, node in enumerate(nodes, start=1):
        ways_K = np.concatenate([[problem.entry_N[node]], problem.hop_NN[nodes[: place - 1], node]])
        time = problem.time_N[node]
        usable = np.flatnonzero(np.isfinite(cost_KM[:place]).any(axis=1) & (ways_K <= limit_s))
        if not len(usable):
            continue
        spare_K = np.full(len(usable), np.inf) if math.isinf(limit_s) else limit_s - ways_K[usable]
        values_KM = cost_KM[usable] + ways_K[usable, None] - time * ruler.work_M
        least_KM, start_at_KM = _window_least(values_KM, ruler.first(spare_K, time, problem.memory_N[node]))
        best_M = least_KM.argmin(axis=0)
        cost_KM[place] = least_KM[best_M, boundaries_M] + time * ruler.work_M
        before_KM[place] = usable[best_M]
        start_KM[place] = start_at_KM[best_M, boundaries_M]
    ends_s = problem.exit_N[nodes] + problem.client_s
    total_K = np.where(ends_s <= limit_s, cost_KM[1:, -1] + ends_s, math.inf)
    if not np.isfinite(total_K).any():
        return None
    stages: list[Stage] = []
    place, end = int(total_K.argmin()) + 1, size - 1
    while place > 0:
        start = int(start_KM[place, end])
        stages.append(Stage(int(nodes[place - 1]), start, end))
        place, end = int(before_KM[place, end]), start
    return tuple(reversed(stages))


def _window_least(values_KM: Floats, first_KM: Ints) -> tuple[Floats, Ints]:
    """For each boundary m the least of values[first[m] : m] in its row, and where it stands; inf where it is empty.

    By a table of minima over windows of 1, 2, 4, … values, two of which cover any window.
    """
    rows, size = values_KM.shape
    at_KM = np.broadcast_to(np.arange(size), values_KM.shape)
    levels = [(values_KM, at_KM)]
    width = 1
    while 2 * width <= size:
        least, at = levels[-1]
        left, right = least[:, :-width], least[:, width:]
        nearer = left <= right
        levels.append((np.where(nearer, left, right), np.where(nearer, at[:, :-width], at[:, width:])))
        width *= 2
    length_KM = np.arange(size) - first_KM
    found_KM = np.full((rows, size), math.inf)
    start_KM = np.full((rows, size), _NOTHING)
    for level, (least, at) in enumerate(levels):
        width = 1 << level
        row, m = np.nonzero((length_KM >= width) & (length_KM < 2 * width))
        left_at, right_at = first_KM[row, m], m - width
        left, right = least[row, left_at], least[row, right_at]
        found_KM[row, m] = np.minimum(left, right)
        start_KM[row, m] = np.where(left <= right, at[row, left_at], at[row, right_at])
    return found_KM, start_KM


def _least_mixture(
    problem: ChainProblem, order: Sequence[int], objective: Objective, fastest: Chain, slack: float
) -> Chain:
    """Least a·bottleneck + b·latency, by branch and bound over limits of the bottleneck.

    Between two limits no chain has a smaller bottleneck than the lower one, nor less latency than the upper allows.
    """
    steady = least_bottleneck(problem, order)
    assert steady is not None, "the fastest chain is one already"
    best = min((fastest, steady), key=lambda chain: problem.value(chain, objective))
    value = problem.value(best, objective)
    intervals = [(problem.cost(steady)[0], *problem.cost(fastest))]
    while intervals:
        low_s, high_s, latency_s = intervals.pop()
        if objective.value(low_s, latency_s) >= value * (1 - slack) or high_s - low_s <= 4 * TOLERANCE * high_s:
            continue
        # nothing below `high_s` is known yet: look at the middle, or just below the upper end of what is left
        wide = high_s - low_s > 1e-6 * high_s
        middle_s = (low_s + high_s) / 2 if wide else max(low_s, high_s * (1 - 2 * TOLERANCE))
        chain = least_latency(problem, order, middle_s)
        if chain is None:
            continue  # only rounding separates the middle from the least bottleneck
        if problem.value(chain, objective) < value:
            best, value = chain, problem.value(chain, objective)
        bottleneck_s, less_s = problem.cost(chain)
        # by rounding a chain may be a little above the limit it was found with: what is left must shrink all the same
        intervals.append((low_s, min(bottleneck_s, middle_s), less_s))
        if wide:
            intervals.append((middle_s, high_s, latency_s))
    return best


def nearest_order(problem: ChainProblem) -> list[int]:
    """From the node nearest to the client (the fastest, where all are equally near), always on to the nearest."""
    order = [int(np.lexsort((problem.time_N, problem.entry_N))[0])]
    left = np.delete(np.arange(problem.node_count), order[0])
    while len(left):
        at = int(problem.hop_NN[order[-1], left].argmin())
        order.append(int(left[at]))
        left = np.delete(left, at)
    return order


def _sums(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])
