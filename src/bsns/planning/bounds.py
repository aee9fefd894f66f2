"""Lower bounds on every plan's value: what certifies a plan. Never above the best possible, replicas or not.

Each looks at one thing and forgets the rest: how much work all nodes together do in the time of the slowest stage;
how cheaply blocks could be had if every node were reached by its cheapest way; the cheapest walk that may come back
to a node; the best one-to-one pairing of nodes with predecessors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.chain_dp import Ruler
from bsns.planning.problem import ChainProblem, Floats

PAIRED_NODES = 128
"""The pairing and the walk need N² figures and more: beyond so many nodes they are left out."""
FIRSTS = 256
"""So many candidates for the first node are looked at one by one."""
ROUNDING = 1e-9
"""Bounds are lowered by this share, so that sums taken in another order do not pass the truth."""


@dataclass(frozen=True, slots=True)
class Floors:
    """What bounds need of each node, so that thousands can be bounded without an N × N table."""

    work_L: Floats
    time_N: Floats
    most_N: Floats
    """The most work that fits its memory, wherever its range begins; 0 for a node with no room for any block."""
    way_N: Floats
    """Its cheapest way in from another node; inf where there is no other."""
    entry_N: Floats
    exit_N: Floats
    client_s: float

    @classmethod
    def of(cls, problem: ChainProblem) -> Floors:
        hop_NN = problem.hop_NN.copy()
        np.fill_diagonal(hop_NN, math.inf)
        return cls(
            problem.work_L,
            problem.time_N,
            most_work(problem.work_L, problem.bytes_L, problem.memory_N),
            hop_NN.min(axis=0),
            problem.entry_N,
            problem.exit_N,
            problem.client_s,
        )


def most_work(work_L: Floats, bytes_L: Floats, memory_N: Floats) -> Floats:
    """For each memory the most work in a range of blocks that fits it."""
    work_M = np.concatenate([[0.0], np.cumsum(work_L)])
    bytes_M = np.concatenate([[0.0], np.cumsum(bytes_L)])
    # the least memory for each amount of work: ranges by size, then the most work within any memory
    if len(work_L) <= 512:
        start, end = np.triu_indices(len(work_M), 1)
        need, work = bytes_M[end] - bytes_M[start], work_M[end] - work_M[start]
        order = np.argsort(need, kind="stable")
        best = np.concatenate([[0.0], np.maximum.accumulate(work[order])])
        return best[np.searchsorted(need[order], memory_N, side="right")]
    best_N = np.zeros(len(memory_N))
    for first in range(len(work_L)):
        last_N = np.searchsorted(bytes_M, bytes_M[first] + memory_N, side="right") - 1
        best_N = np.maximum(best_N, work_M[last_N] - work_M[first])
    return best_N


def lower_bound(problem: ChainProblem, objective: Objective, *, replicas: bool = False) -> float:
    """No chain has a smaller value; with `replicas`, no chain whose stages several nodes may share."""
    floors = Floors.of(problem)
    if not (floors.most_N > 0).any():
        return math.inf
    bottleneck_s = latency_s = 0.0
    if objective.bottleneck:
        bottleneck_s = bottleneck_floor(floors, replicas=replicas)
        if not replicas and problem.node_count <= PAIRED_NODES and math.isfinite(bottleneck_s):
            bottleneck_s = max(bottleneck_s, _paired_bottleneck(problem, bottleneck_s))
    if math.isinf(bottleneck_s):
        return math.inf
    if objective.latency:
        latency_s = latency_floor(floors)
        if problem.node_count <= PAIRED_NODES:
            latency_s = max(latency_s, _walk_latency(problem))
    return objective.value(bottleneck_s, latency_s)


def bottleneck_floor(floors: Floors, *, replicas: bool) -> float:
    """The least time in which all nodes together can do the work of one token: work / speed, with memory and ways.

    In T seconds a node without replicas takes at most min(what fits, (T − way) / time) of the work. With replicas a
    node of a stage of work w takes the share T / (w·time + way) of its tokens, at most all: w times that share grows
    with w, so the most it can do for one token is with all that fits. Nodes of the first stage are reached from the
    client, and do its work only: all of it, at most the largest range that fits a node.
    """
    work = float(floors.work_L.sum())
    able = floors.most_N > 0
    time_N, most_N = floors.time_N[able], floors.most_N[able]
    way_N, entry_N = floors.way_N[able], floors.entry_N[able]
    least_block = float(floors.work_L.min())

    def done_N(limit_s: float, ways_N: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            if replicas:
                return np.where(
                    np.isfinite(ways_N), most_N * np.minimum(1.0, limit_s / (most_N * time_N + ways_N)), 0.0
                )
            done = np.minimum(most_N, (limit_s - ways_N) / time_N)
            return np.where(done >= least_block * (1 - ROUNDING), done, 0.0)

    def possible(limit_s: float) -> bool:
        first_N, later_N = done_N(limit_s, entry_N), done_N(limit_s, way_N)
        gain_N = np.maximum(first_N - later_N, 0.0)
        gain = min(float(gain_N.sum()), float(most_N.max())) if replicas else float(gain_N.max())
        return float(later_N.sum()) + gain >= work * (1 - ROUNDING)

    floor_s = max(floors.client_s + float(floors.exit_N[able].min()), _heaviest_block(floors, replicas=replicas))
    return max(floor_s, _least(possible, floor_s))


def _heaviest_block(floors: Floors, *, replicas: bool) -> float:
    """Somebody has to compute the heaviest block (and be reached for it)."""
    able = floors.most_N > 0
    ways_N = np.minimum(floors.way_N, floors.entry_N)[able]
    seconds_N = floors.work_L.max() * floors.time_N[able] + ways_N
    return float(1 / (1 / seconds_N).sum()) if replicas else float(seconds_N.min())


def latency_floor(floors: Floors) -> float:
    """Blocks bought where they are cheapest, each node's way in paid by the share of its room that is used.

    That is the linear relaxation of: a node that takes any block is reached once. One node, whichever is best, is
    reached from the client in place of its cheapest way.
    """
    able = floors.most_N > 0
    work = float(floors.work_L.sum())
    time_N, most_N, entry_N = floors.time_N[able], np.minimum(floors.most_N[able], work), floors.entry_N[able]
    if most_N.sum() < work * (1 - ROUNDING):
        return math.inf
    way_N = np.where(np.isfinite(floors.way_N[able]), floors.way_N[able], 0.0)
    price_N = time_N + way_N / most_N
    all_s = _bought(price_N, most_N, work)
    more_N = entry_N - way_N  # whoever is first pays this on top of its way, at least: it may use a share of it only
    firsts = np.argsort(more_N, kind="stable")
    best_s = math.inf if len(firsts) <= FIRSTS else all_s + float(more_N[firsts[FIRSTS]])
    for first in firsts[:FIRSTS].tolist():
        if all_s + more_N[first] < best_s:
            prices_N = price_N.copy()
            prices_N[first] = time_N[first]
            best_s = min(best_s, _bought(prices_N, most_N, work) + float(entry_N[first]))
    return max(0.0, best_s + float(floors.exit_N[able].min()) + floors.client_s) * (1 - ROUNDING)


def _bought(price_N: Floats, most_N: Floats, work: float) -> float:
    order = np.argsort(price_N, kind="stable")
    taken = np.minimum(np.cumsum(most_N[order]), work)
    return float((np.diff(taken, prepend=0.0) * price_N[order]).sum())


def _paired_bottleneck(problem: ChainProblem, low_s: float) -> float:
    """As `bottleneck_floor`, whole blocks, and no node handing over to two others: a largest pairing (Kuhn, 1955)."""
    from scipy.optimize import linear_sum_assignment  # here: every node imports this module, and few plan

    room_N = most_work(np.ones(problem.block_count), problem.bytes_L, problem.memory_N)
    able = np.flatnonzero(room_N > 0)
    ways = np.vstack([problem.entry_N[None, able], problem.hop_NN[np.ix_(able, able)]])
    ways[np.arange(len(able)) + 1, np.arange(len(able))] = math.inf
    lightest_M = np.concatenate([[0.0], np.cumsum(np.sort(problem.work_L))])

    def possible(limit_s: float) -> bool:
        budget = np.maximum((limit_s - ways) / problem.time_N[able], -1.0)
        blocks = np.searchsorted(lightest_M, budget * (1 + ROUNDING), side="right") - 1
        blocks = np.where(budget >= 0, np.minimum(blocks, room_N[able]), 0)
        rows, columns = linear_sum_assignment(-blocks)
        return int(blocks[rows, columns].sum()) >= problem.block_count

    return _least(possible, low_s)


def _walk_latency(problem: ChainProblem) -> float:
    """The least latency if a node could be come back to: exact ways, memory held only within a visit."""
    ruler = Ruler.of(problem)
    size, count = problem.block_count + 1, problem.node_count
    if size * size * count > 2e7:
        return 0.0
    hop_NN = problem.hop_NN.copy()
    np.fill_diagonal(hop_NN, math.inf)
    first_NM = np.stack(
        [np.searchsorted(ruler.bytes_M, ruler.bytes_M - memory, side="left") for memory in problem.memory_N]
    )
    way_NM = np.full((count, size), math.inf)  # arriving at node n with m blocks done, less what its work so far saves
    way_NM[:, 0] = problem.entry_N
    cost_N = np.full(count, math.inf)
    for m in range(1, size):
        for_N = np.arange(m)[None, :] >= first_NM[:, m : m + 1]
        cost_NM = way_NM[:, :m] + problem.time_N[:, None] * (ruler.work_M[m] - ruler.work_M[:m])[None, :]
        cost_N = np.where(for_N, cost_NM, math.inf).min(axis=1)
        way_NM[:, m] = (cost_N[:, None] + hop_NN).min(axis=0)
    return float((cost_N + problem.exit_N).min() + problem.client_s) * (1 - ROUNDING)


def _least(possible: Callable[[float], bool], low_s: float) -> float:
    """A limit that is not possible, or the least one that is, to nine digits; inf where none is."""
    if possible(low_s):
        return low_s
    high_s = max(low_s, 1e-9)
    while not possible(high_s):
        low_s, high_s = high_s, high_s * 2
        if high_s > 1e12:
            return math.inf
    while high_s - low_s > 1e-10 * high_s:
        middle_s = (low_s + high_s) / 2
        if possible(middle_s):
            high_s = middle_s
        else:
            low_s = middle_s
    return low_s
