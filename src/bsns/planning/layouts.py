"""Layouts: what the ranges that nodes hold now are worth, and whether a new plan is worth moving for. Pure."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId
from bsns.core.plan import Objective
from bsns.planning.problem import ChainProblem

WORTH_MOVING = 0.1
"""How much better a new plan must be, so that nothing flaps: what is left is at least 90 % of the best (decision 0008).

Petals asks for 20 to 25 % (arXiv 2312.08361, §3.2), where a move costs the caches of sessions that have to be opened
again; here a node serves its old range until they have ended."""

BEAM = 32
"""Of more nodes that a stage may end with, so many are gone on from."""

Ranges = Mapping[PeerId, Sequence[BlockRange]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a layout, as a plan's: its slowest stage's time for a token, one token's way. inf where blocks are missing."""

    bottleneck_s: float
    latency_s: float

    def value(self, objective: Objective) -> float:
        return objective.value(self.bottleneck_s, self.latency_s) if math.isfinite(self.bottleneck_s) else math.inf


NOTHING = Cost(math.inf, math.inf)


def layout_cost(problem: ChainProblem, ranges: Ranges, objective: Objective) -> Cost:
    """What a layout costs by the better of two ways to use it, both of which it really affords.

    Either one node computes each stage, or all that hold a stage share its work; then a node gives each stage no more
    than that stage's part of what it holds. Stages are cut where somebody's range begins or ends. The way is found by
    dynamic programming over the cuts and the last node; it is the best for a single weight, near it for a mixture and
    where more than BEAM nodes end at a cut.
    """
    index = {peer: number for number, peer in enumerate(problem.peers)}
    held = [(index[peer], blocks) for peer, those in ranges.items() if peer in index for blocks in those]
    cuts = sorted({0, problem.block_count, *(end for _, blocks in held for end in (blocks.start, blocks.end))})
    stages: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)  # a stage's holders, and their part for it
    for node, blocks in held:
        inside = [cut for cut in cuts if blocks.start <= cut <= blocks.end]
        for at, start in enumerate(inside):
            for end in inside[at + 1 :]:
                part = float(problem.work_L[start:end].sum() / problem.work_L[blocks.start : blocks.end].sum())
                stages[start, end][node] = max(part, stages[start, end].get(node, 0.0))
    costs = [_best_way(problem, stages, objective, shared) for shared in (False, True)]
    return min(costs, key=lambda cost: cost.value(objective))


def _best_way(
    problem: ChainProblem, stages: Mapping[tuple[int, int], Mapping[int, float]], objective: Objective, shared: bool
) -> Cost:
    client_s = problem.client_s
    # cut → last node → the best way there, and the nodes on it: a session is on a node once
    reached: defaultdict[int, dict[int, tuple[Cost, frozenset[int]]]] = defaultdict(dict)
    reached[0][-1] = Cost(client_s, client_s), frozenset()
    for start, end in sorted(stages, key=lambda stage: (stage[1], stage[0])):
        holders = stages[start, end]
        nodes_H = np.fromiter(holders, np.intp, len(holders))
        parts_H = np.fromiter(holders.values(), np.float64, len(holders))
        compute_H = problem.work_L[start:end].sum() * problem.time_N[nodes_H]
        for last, (way, used) in _likeliest(reached[start], objective):
            seconds_H = compute_H + (problem.entry_N if last < 0 else problem.hop_NN[last])[nodes_H]
            slowest_H = seconds_H
            if shared:
                with np.errstate(divide="ignore"):
                    slowest_H = np.full(len(holders), 1 / (parts_H / seconds_H).sum())
            costs = zip(np.maximum(way.bottleneck_s, slowest_H), way.latency_s + seconds_H, strict=True)
            for node, (bottleneck_s, latency_s) in zip(holders, costs, strict=True):
                cost = Cost(float(bottleneck_s), float(latency_s))
                known = reached[end].get(node)
                if node not in used and (known is None or cost.value(objective) < known[0].value(objective)):
                    reached[end][node] = cost, used | {node}
    ends: list[Cost] = []
    for node, (way, _) in reached[problem.block_count].items():
        back_s = float(problem.exit_N[node])
        ends.append(Cost(max(way.bottleneck_s, back_s + problem.client_s), way.latency_s + back_s))
    return min(ends, key=lambda cost: cost.value(objective), default=NOTHING)


def _likeliest(
    reached: Mapping[int, tuple[Cost, frozenset[int]]], objective: Objective
) -> list[tuple[int, tuple[Cost, frozenset[int]]]]:
    """The best ways to a cut: all of a small swarm's, of a large one's BEAM."""
    ways = list(reached.items())
    return ways if len(ways) <= BEAM else heapq.nsmallest(BEAM, ways, key=lambda way: way[1][0].value(objective))


def why_move(
    held_value: float,
    ordered_value: float,
    new_value: float,
    ordered: Mapping[PeerId, BlockRange],
    new: Mapping[PeerId, BlockRange],
) -> str | None:
    """Why a new plan should replace the one in force, in words; None if it should not.

    Values are the objective's, lower is better: of what is held, of what the plan in force orders (inf if nodes it
    needs are gone), and of the new plan. A move must be worth its cost, unless it moves nobody who has a place.
    """
    if dict(ordered) == dict(new):
        return None
    if math.isinf(held_value) and math.isinf(ordered_value):
        return "some blocks are held by nobody"
    if ordered and math.isinf(ordered_value):
        return "nodes that the plan needs are gone"
    now = min(held_value, ordered_value)
    if new_value <= now * (1 - WORTH_MOVING):
        return f"it is {1 - new_value / now:.0%} better"
    only_newcomers = bool(ordered) and all(new.get(peer) == blocks for peer, blocks in ordered.items())
    if only_newcomers and new_value < now:
        return "newcomers have a place"
    return None
