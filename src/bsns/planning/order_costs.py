"""What orders of devices cost, a whole population at once; and the worths of ways for a path search."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bsns.core.plan import Objective
from bsns.planning.bounds import most_work
from bsns.planning.chain_dp import TOLERANCE, Ints
from bsns.planning.path_search import NEVER
from bsns.planning.problem import ChainProblem, Floats

Mask = NDArray[np.bool_]

HALVINGS = 14
LIMITS = 12
"""Limits on a turn that a mixed objective tries in one decoding."""
SPLIT_WEIGHT = 1e-3
MISFIT = 1e6
"""Seconds, times one and the share of the work that finds no room: orders nearer to fitting are better ones."""


class Scorer:
    """What orders cost, many at once. Exact for equal blocks; for unequal ones a node's share of the work counts,
    less half a block for what does not divide."""

    def __init__(self, problem: ChainProblem, objective: Objective) -> None:
        self.objective = objective
        self.count = problem.node_count
        self.ways = np.vstack([problem.hop_NN, problem.entry_N[None]])  # the last row: from the client
        self.time_N = problem.time_N
        self.back_N = problem.exit_N + problem.client_s
        self.work = float(problem.work_L.sum())
        self.block = self.work / problem.block_count
        self.alike = bool(np.ptp(problem.work_L) == 0 and np.ptp(problem.bytes_L) == 0)
        most_N = most_work(problem.work_L, problem.bytes_L, problem.memory_N)
        self.most_N = most_N if self.alike else np.maximum(most_N - 0.4 * self.block, most_N * 0.5)
        self.by_speed = np.argsort(problem.time_N, kind="stable")
        worst = float(np.max(self.work * problem.time_N) + self.ways.max() + self.back_N.max())
        self.top_s = worst * (1 + 1e-9)

    def costs_of(self, orders_PN: Ints, used_P: Ints) -> Floats:
        """(P,) The objective's value of the best cut without skipping; what does not fit costs more than anything."""
        way_PN, inside_PN = self._ways(orders_PN, used_P)
        lacking_P, _ = self._fill(orders_PN, used_P, way_PN, inside_PN, np.full(len(used_P), self.top_s))
        if self.objective.latency == 0:
            cost_P = self.objective.bottleneck * self._least_limit(orders_PN, used_P, way_PN, inside_PN)
        elif self.objective.bottleneck == 0:
            top_P = np.full(len(used_P), self.top_s)
            cost_P = self.objective.latency * self._latency(orders_PN, used_P, way_PN, inside_PN, top_P)
        else:
            least_P = self._least_limit(orders_PN, used_P, way_PN, inside_PN)
            cost_P = np.full(len(used_P), math.inf)
            for limit_P in least_P * np.geomspace(1 + 1e-9, 8, LIMITS)[:, None]:
                latency_P = self._latency(orders_PN, used_P, way_PN, inside_PN, limit_P)
                cost_P = np.minimum(cost_P, self.objective.value(1, 0) * limit_P + self.objective.latency * latency_P)
        return np.where(lacking_P > 0, MISFIT * (1 + lacking_P / self.work), cost_P)

    def cost_of(self, path: Ints) -> float:
        return float(self.costs_of(*self._row(path))[0])

    def limit_below(self, path: Ints, share: float) -> float:
        """A limit on turns that is so much below what a path needs."""
        orders, used = self._row(path)
        return float(self._least_limit(orders, used, *self._ways(orders, used))[0]) * (1 - share)

    def given(self, path: Ints, limit_s: float) -> float:
        """The work that finds room on a path's nodes under a limit."""
        orders, used = self._row(path)
        way_PN, inside_PN = self._ways(orders, used)
        room_PN = self._blocks(orders, way_PN, np.array([limit_s]))
        return float(np.where(inside_PN, np.maximum(room_PN, 0.0), 0.0).sum())

    def price(self, path: Ints) -> float:
        """What a unit of work costs on a path's dearest node: a first guess of its price."""
        return float(self.time_N[path].max() + self.ways[:-1].mean() * self.count / self.work) * 1.05

    def worth(self, limit_s: float, price: float) -> Floats:
        """Worths of ways for a `PathSearch` under a limit: the work a node can take, or what it saves at a price."""
        count = self.count
        ways = np.vstack([self.ways, np.full((1, count), MISFIT)])  # nothing comes after the end
        split = np.minimum((limit_s - ways) / self.time_N, self.most_N)
        if self.alike:
            room = np.minimum(
                np.floor((limit_s - ways) / self.time_N / self.block * (1 + TOLERANCE)) * self.block, self.most_N
            )
            idle = room < self.block * (1 - 1e-9)
        else:
            room = split = split - 0.4 * self.block
            idle = room < 0.3 * self.block
        worth = np.full((count + 2, count + 2), NEVER)
        if self.objective.latency:
            gain = price - self.time_N
            saved = np.where(gain > 0, room * gain, self.block * gain) - np.minimum(ways, 1e6)
            worth[:, :count] = np.where(idle, NEVER, saved)
            worth[:count, -1] = np.where(self.back_N <= limit_s, -self.back_N, NEVER)
        else:
            # whole blocks count; what else would fit if they could be split tells paths apart that take the same
            worth[:, :count] = np.where(idle, NEVER, room + SPLIT_WEIGHT * self.block * (split - room))
            worth[:count, -1] = np.where(self.back_N <= limit_s * (1 + TOLERANCE), 0.0, NEVER)
        return worth

    @property
    def enough(self) -> float:
        """A path worth so much has room for all work; no path is, where its worth is what it saves."""
        return math.inf if self.objective.latency else self.work * (1 - 1e-9)

    def _row(self, path: Ints) -> tuple[Ints, Ints]:
        free = np.ones(self.count, dtype=bool)
        free[path] = False
        return np.concatenate([path, np.flatnonzero(free)])[None], np.array([len(path)])

    def _ways(self, orders_PN: Ints, used_P: Ints) -> tuple[Floats, Mask]:
        before_PN = np.empty_like(orders_PN)
        before_PN[:, 0] = self.count
        before_PN[:, 1:] = orders_PN[:, :-1]
        return self.ways[before_PN, orders_PN], np.arange(self.count)[None, :] < used_P[:, None]

    def _blocks(self, orders_PN: Ints, way_PN: Floats, limit_P: Floats) -> Floats:
        """(P, N) The work each node can take under the limit; below a block's: none."""
        room_PN = (limit_P[:, None] - way_PN) / self.time_N[orders_PN]
        if self.alike:
            room_PN = np.floor(room_PN / self.block * (1 + TOLERANCE)) * self.block
        else:
            room_PN = room_PN - 0.4 * self.block
        return np.minimum(room_PN, self.most_N[orders_PN])

    def _fill(
        self, orders_PN: Ints, used_P: Ints, way_PN: Floats, inside_PN: Mask, limit_P: Floats
    ) -> tuple[Floats, Floats]:
        """(P,) The work that finds no room under the limit, and the same if blocks could be split.

        A node that cannot take a block, or a last one too far from the client, counts as so much work undone.
        """
        room_PN = self._blocks(orders_PN, way_PN, limit_P)
        least = self.block * (1 - 1e-9) if self.alike else self.block * 0.3
        idle_PN = inside_PN & (room_PN < least)
        rows = np.arange(len(used_P))
        far_P = self.back_N[orders_PN[rows, used_P - 1]] > limit_P * (1 + TOLERANCE)
        given_P = np.where(inside_PN, np.maximum(room_PN, 0.0), 0.0).sum(axis=1)
        split_PN = np.minimum((limit_P[:, None] - way_PN) / self.time_N[orders_PN], self.most_N[orders_PN])
        split_P = np.where(inside_PN, split_PN, 0.0).sum(axis=1)
        bad_P = (idle_PN.sum(axis=1) + far_P) * self.block
        lacking_P = np.maximum(self.work - given_P, 0.0)
        lacking_P = np.where(lacking_P < 1e-9 * self.work, 0.0, lacking_P) + bad_P
        return lacking_P, np.maximum(self.work - split_P, -self.work) + self.work + bad_P

    def _least_limit(self, orders_PN: Ints, used_P: Ints, way_PN: Floats, inside_PN: Mask) -> Floats:
        low_P, high_P = np.zeros(len(used_P)), np.full(len(used_P), self.top_s)
        # no limit below the slowest single block is possible
        one_PN = np.where(inside_PN, way_PN + self.block * self.time_N[orders_PN] * (1 if self.alike else 0.3), 0.0)
        low_P = np.maximum(low_P, one_PN.max(axis=1) * (1 - 1e-9))
        even_P = one_PN.max(axis=1) + self.work / np.where(inside_PN, 1 / self.time_N[orders_PN], 0.0).sum(axis=1)
        for halving in range(HALVINGS):
            middle_P = np.where(high_P >= self.top_s, np.maximum(low_P, even_P) * 1.5**halving, (low_P + high_P) / 2)
            middle_P = np.minimum(middle_P, (low_P + high_P) / 2)
            fits_P = self._fill(orders_PN, used_P, way_PN, inside_PN, middle_P)[0] == 0
            high_P, low_P = np.where(fits_P, middle_P, high_P), np.where(fits_P, low_P, middle_P)
        return high_P

    def _latency(self, orders_PN: Ints, used_P: Ints, way_PN: Floats, inside_PN: Mask, limit_P: Floats) -> Floats:
        """(P,) Least latency under the limits: one block each, the rest to the fastest with room; inf if none fits."""
        rows = np.arange(len(used_P))
        room_PN = np.where(inside_PN, self._blocks(orders_PN, way_PN, limit_P), 0.0)
        by_node_PN = np.zeros_like(room_PN)
        np.put_along_axis(by_node_PN, orders_PN, room_PN, axis=1)
        room_PN = by_node_PN[:, self.by_speed]
        first_PN = np.minimum(room_PN, self.block)
        spare_PN = room_PN - first_PN
        rest_P = self.work - first_PN.sum(axis=1)
        taken_PN = np.diff(
            np.minimum(np.cumsum(spare_PN, axis=1), np.maximum(rest_P, 0.0)[:, None]), axis=1, prepend=0.0
        )
        compute_P = ((first_PN + taken_PN) * self.time_N[self.by_speed]).sum(axis=1)
        lacking_P, _ = self._fill(orders_PN, used_P, way_PN, inside_PN, limit_P)
        ways_P = np.where(inside_PN, way_PN, 0.0).sum(axis=1) + self.back_N[orders_PN[rows, used_P - 1]]
        impossible_P = (lacking_P > 0) | (rest_P < -1e-9 * self.work)  # more nodes than blocks
        return np.where(impossible_P, math.inf, compute_P + ways_P)
