"""Prefix bounds: why a bottleneck cannot be reached, from what lies before and after each boundary between parts.

Computed one after another, the first j parts hold a prefix of the graph. Within a bottleneck T its work is at most j·T,
less the io those parts pay, and at least W − (k − j)·T, plus the io the others pay. An operator whose ancestors alone
are too much for j parts is in none of the first j; one without which too little would be left is in one of them. So
every boundary lies between operators that are surely before and surely behind it, and a minimum cut says what must
cross. That io narrows the windows, which raises the cuts, and so on, until a window is empty or nothing changes.

Suffixes say the axes: V operators, J boundaries 0 … k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bsns.planning.graph import Floats, Ints, OperatorGraph
from bsns.planning.min_cuts import PrefixCuts

ROUNDS = 12
NEAR = (1, 2, 4)
"""How many parts from a boundary a tensor may begin or end, for its second payment to count for a prefix."""


class Windows:
    """Which parts each operator can be in within a bottleneck: `early_V` to `late_V`, numbered from 1."""

    def __init__(self, graph: OperatorGraph, reach_VV: Floats, io_V: Floats, parts: int, limit_s: float) -> None:
        self.graph, self.io_V, self.parts, self.limit_s = graph, io_V, parts, limit_s
        self._reach_VV = reach_VV
        self.early_V = np.ones(graph.count, dtype=np.intp)
        self.late_V = np.full(graph.count, parts, dtype=np.intp)
        total_s = float(graph.work_V.sum())
        self.least_J = np.maximum(total_s - (parts - np.arange(parts + 1)) * limit_s, 0.0)
        self.most_J = np.minimum(np.arange(parts + 1) * limit_s, total_s)
        """Work of the first j parts."""
        self.empty = False
        """Whether no partition reaches the bottleneck."""
        self.least_io_s = 0.0
        """Of all parts together."""

    def narrow(self, sizes: Sequence[Floats]) -> bool:
        """Narrows the windows as far as they go; whether one became empty.

        In each of `sizes`, no part exceeds the limit. Only work, the first of them, leaves room for io.
        """
        before_J = np.zeros(self.parts + 1)
        after_J = np.zeros(self.parts + 1)
        sums = [(self._reach_VV @ size_V, self._reach_VV.T @ size_V, float(size_V.sum())) for size_V in sizes]
        for _ in range(ROUNDS):
            for number, (ancestors_V, descendants_V, total) in enumerate(sums):
                taken_J, left_J = (before_J, after_J) if number == 0 else (0.0, 0.0)
                self._place(number, ancestors_V, descendants_V, total, taken_J, left_J)
                if self.empty:
                    return True
            earlier = self.least_io_s
            before_J, after_J = self._payments()
            if self.least_io_s < earlier + 1e-4 * self.limit_s:
                break
        return self.empty

    def _place(
        self,
        number: int,
        ancestors_V: Floats,
        descendants_V: Floats,
        total: float,
        before_J: Floats | float,
        after_J: Floats | float,
    ) -> None:
        """Moves early and late by what the first j parts can hold at most and must hold at least, by a size."""
        steps_J = np.arange(self.parts + 1)
        slack = 1e-9 * total
        most_J = np.minimum.accumulate((steps_J * self.limit_s - before_J)[::-1])[::-1] + slack
        least_J = np.maximum.accumulate(total - (self.parts - steps_J) * self.limit_s + after_J) - slack
        if (most_J < least_J).any() or most_J[0] < -slack or least_J[-1] > total + slack:
            self.empty = True
            return
        if number == 0:
            self.least_J, self.most_J = least_J, most_J
        early_V = np.searchsorted(most_J, ancestors_V, side="left")
        late_V = np.minimum(np.searchsorted(least_J, total - descendants_V, side="right"), self.parts)
        self.early_V = np.maximum(self.early_V, early_V)
        self.late_V = np.minimum(self.late_V, late_V)
        self.empty = bool((self.early_V > self.late_V).any())

    def _payments(self) -> tuple[Floats, Floats]:
        """What the first j parts pay for io at least, and what the others do (J)."""
        parts, graph = self.parts, self.graph
        before_J, after_J, sure_V = self._sure()
        last_V = np.array([max([self.late_V[c] for c in consumers], default=0) for consumers in graph.consumers])
        span_V = last_V - self.early_V
        maybe_V = (self.io_V > 0) & ~sure_V & (span_V > 0)
        # a tensor pays once on either side, wherever it is cut: each boundary counts its share
        share_V = np.where(maybe_V, self.io_V / np.maximum(span_V, 1), 0.0)
        total_s = float(before_J[-1])
        for i in range(1, parts):
            payers = np.flatnonzero(maybe_V & (self.early_V <= i) & (last_V > i))
            if not payers.size:
                continue
            cuts = PrefixCuts(graph, share_V, self.late_V <= i, self.early_V > i, payers)
            least_s = cuts.least()
            if least_s <= 0:
                continue
            total_s += 2 * least_s
            before_J[i:parts] += least_s  # on its way out of a part before the boundary
            after_J[1 : i + 1] += least_s  # on its way into a part behind it
            self._near(cuts, payers, i, least_s, last_V, before_J, after_J)
        before_J[-1] = after_J[0] = self.least_io_s = max(self.least_io_s, total_s)
        return before_J, after_J

    def _near(
        self, cuts: PrefixCuts, payers: Ints, i: int, least_s: float, last_V: Ints, before_J: Floats, after_J: Floats
    ) -> None:
        """Adds the second payments at boundary i: of tensors surely read in the next parts, or made in the last."""
        parts = self.parts
        for ends, sums_J, sign in ((last_V[payers] - i, before_J, 1), (i + 1 - self.early_V[payers], after_J, -1)):
            counted_s = 0.0
            for near in NEAR:
                j = i + sign * near
                if not 0 < j < parts:
                    break
                near_V = ends <= near
                value_s = least_s if near_V.all() else cuts.least(near_V) if near_V.any() else 0.0
                if value_s > counted_s:
                    where = slice(j, parts) if sign > 0 else slice(1, j + 1)
                    sums_J[where] += value_s - counted_s
                    counted_s = value_s
                if near_V.all():
                    break

    def _sure(self) -> tuple[Floats, Floats, Ints]:
        """What tensors pay that are cut wherever the boundaries are, before and after each, and which they are.

        A tensor comes into as many parts as its consumers' windows can be stabbed apart behind its producer's.
        """
        before_J, after_J = np.zeros(self.parts + 1), np.zeros(self.parts + 1)
        early, late, io = self.early_V.tolist(), self.late_V.tolist(), self.io_V.tolist()
        sure_V = np.zeros(self.graph.count, dtype=bool)
        for v, consumers in enumerate(self.graph.consumers):
            if not consumers or io[v] <= 0 or max([early[c] for c in consumers]) <= late[v]:
                continue
            sure_V[v] = True
            before_J[late[v] :] += io[v]
            after_J[: early[v]] += io[v]
            apart = [(late[c], early[c]) for c in consumers if early[c] > late[v]]
            reached = 0
            for end, start in sorted(apart):
                if start > reached:
                    before_J[end:] += io[v]
                    reached = end
            reached = self.parts + 1
            for start, end in sorted(((start, end) for end, start in apart), reverse=True):
                if end < reached:
                    after_J[:start] += io[v]
                    reached = start
        return before_J, after_J, sure_V
