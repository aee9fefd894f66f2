"""Segments: what the consecutive pieces of a topological order cost.

f(l..r) of all pieces of an order come from O(V + E) differences by two running sums: a tensor changes the costs of
neighbouring pieces only where they begin or end at its producer or at one of its readers. `band` does that for all
short pieces and keeps them by length, `block` for all that begin in one window and end in another.

Suffixes say the axes: P orders, V operators (or places in an order), D lengths, E edges; L where pieces begin, J where
they end, both as prefix lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bsns.planning.graph import Fleet, Floats, Ints, OperatorGraph


@dataclass(frozen=True, eq=False)
class Segments:
    """The pieces of some topological orders of a graph, on a fleet."""

    graph: OperatorGraph
    orders_PV: Ints
    fleet: Fleet

    @property
    def count(self) -> int:
        return self.graph.count

    @cached_property
    def done_PJ(self) -> Floats:
        """Work of each prefix."""
        work_PV = self.graph.work_V[self.orders_PV]
        return np.concatenate([np.zeros((len(work_PV), 1)), np.cumsum(work_PV, axis=1)], axis=1)

    @cached_property
    def blocks_allowed(self) -> bool:
        """`block` does not know the greediest operator of a piece."""
        return math.isinf(self.fleet.memory_bytes) or not self.graph.peak_V.any()

    def longest(self, limit_s: float) -> int:
        """Most operators of a piece whose work alone does not exceed the limit."""
        width = 1
        for done_J in self.done_PJ:
            reach_V = np.searchsorted(done_J, done_J[:-1] + limit_s, side="right") - 1
            width = max(width, int((reach_V - np.arange(self.count)).max()))
        return width

    def band(self, width: int) -> Floats:
        """Costs (D, P, V): at [d, p, r] those of order p's places r − d … r; inf where that begins before the order."""
        graph, orders_PV, fleet, count = self.graph, self.orders_PV, self.fleet, self.count
        cost_DPV = self._rises(width)
        cost_DPV[0] += (graph.work_V + self._sent_V)[orders_PV]
        np.cumsum(cost_DPV, axis=0, out=cost_DPV)
        # [d, r] is now f(r − d … r) less f(r − d … r − 1), so that costs add up as a piece grows
        for d in range(1, width):
            cost_DPV[d, :, d:] += cost_DPV[d - 1, :, d - 1 : -1]
            cost_DPV[d, :, :d] = math.inf
        if math.isfinite(fleet.memory_bytes):
            peak_PV = graph.peak_V[orders_PV]
            greediest_PV = peak_PV.copy()
            for d in range(width):
                np.maximum(greediest_PV[:, d:], peak_PV[:, : count - d], out=greediest_PV[:, d:])
                needed_PV = self._held_PJ[:, d + 1 :] - self._held_PJ[:, : count - d] + greediest_PV[:, d:]
                cost_DPV[d, :, d:] += fleet.overflow_s(needed_PV)
        return cost_DPV

    def block(self, starts: range, ends: range) -> Floats:
        """Costs (P, L, J) of the pieces between prefixes of these lengths; inf where a piece would be empty."""
        orders, wide, high = len(self.orders_PV), len(ends), len(starts)
        # a spare row and column take what begins beyond the window
        shape = (orders, high + 1, wide + 1)
        where: list[Ints] = []
        amount: list[Floats] = []
        row_P1 = np.arange(orders)[:, None] * (high + 1)

        def rectangle(l_from: Ints, l_to: Ints, j_from: Ints, j_to: Ints | None, size: Floats) -> None:
            """Adds to pieces that begin in [l_from, l_to) and end in [j_from, j_to)."""
            l_from = np.clip(l_from - starts.start, 0, high)
            l_to = np.clip(l_to - starts.start, 0, high)
            j_from = np.clip(j_from - ends.start, 0, wide)
            some = (l_from < l_to) & (j_from < wide)
            if j_to is not None:
                j_to = np.clip(j_to - ends.start, 0, wide)
                some &= j_from < j_to
            rows = np.broadcast_to(row_P1, some.shape)[some]
            sizes = np.broadcast_to(size, some.shape)[some]
            columns = [(j_from[some], sizes)] + ([] if j_to is None else [(j_to[some], -sizes)])
            for column, signed in columns:
                where.extend(((rows + l_from[some]) * (wide + 1) + column, (rows + l_to[some]) * (wide + 1) + column))
                amount.extend((signed, -signed))

        reads_PE, earlier_PE, made_PE = self._reads
        rectangle(earlier_PE + 1, reads_PE + 1, reads_PE + 1, None, self._size_E)
        last_E = self._last_E
        if last_E.any():
            made_PS = made_PE[:, last_E]
            begin_PS = np.zeros_like(made_PS)
            rectangle(begin_PS, made_PS + 1, made_PS + 1, reads_PE[:, last_E] + 1, self._size_E[last_E])
        sums = np.bincount(np.concatenate(where), np.concatenate(amount), minlength=math.prod(shape))
        cost_PLJ = sums.astype(np.float64, copy=False).reshape(shape)[:, :high, :wide].cumsum(axis=1).cumsum(axis=2)
        l_s, j_s = slice(starts.start, starts.stop), slice(ends.start, ends.stop)
        cost_PLJ += self.done_PJ[:, None, j_s] - self.done_PJ[:, l_s, None]
        if math.isfinite(self.fleet.memory_bytes):
            cost_PLJ += self.fleet.overflow_s(self._held_PJ[:, None, j_s] - self._held_PJ[:, l_s, None])
        if starts.stop > ends.start:
            cost_PLJ[:, np.arange(starts.start, starts.stop)[:, None] >= np.arange(ends.start, ends.stop)] = math.inf
        return cost_PLJ

    @cached_property
    def _held_PJ(self) -> Floats:
        """Parameter bytes of each prefix."""
        param_PV = self.graph.param_V[self.orders_PV]
        return np.concatenate([np.zeros((len(param_PV), 1)), np.cumsum(param_PV, axis=1)], axis=1)

    @cached_property
    def _sent_V(self) -> Floats:
        return self.graph.sent_V / self.fleet.bytes_per_s

    @cached_property
    def _size_E(self) -> Floats:
        return self._sent_V[self.graph.edges_E2[:, 0]]

    @cached_property
    def _last_E(self) -> NDArray[np.bool_]:
        """Where a producer's edges end; they are sorted by producer."""
        from_E = self.graph.edges_E2[:, 0]
        return np.append(from_E[1:] != from_E[:-1], [True] * bool(len(from_E)))

    @cached_property
    def _reads(self) -> tuple[Ints, Ints, Ints]:
        """Places (P, E) where each tensor is read, where it was read or made before, and where it was made."""
        orders, count = self.orders_PV.shape
        place_PV = np.empty_like(self.orders_PV)
        np.put_along_axis(place_PV, self.orders_PV, np.broadcast_to(np.arange(count), (orders, count)), axis=1)
        from_E, to_E = self.graph.edges_E2[:, 0], self.graph.edges_E2[:, 1]
        reads_PE = from_E * count + place_PV[:, to_E]
        reads_PE.sort(axis=1)  # by producer, then by place
        reads_PE -= from_E * count
        made_PE = place_PV[:, from_E]
        first_E = np.roll(self._last_E, 1)
        return reads_PE, np.where(first_E, made_PE, np.roll(reads_PE, 1, axis=1)), made_PE

    def _rises(self, width: int) -> Floats:
        """Differences along d of what adding place r to a piece does to its io (D, P, V).

        A tensor that r reads comes in if the piece begins after its producer and after all its earlier readers; one
        that r is the last to read no longer goes out of pieces that hold its producer.
        """
        orders, count = self.orders_PV.shape
        if not len(self.graph.edges_E2):
            return np.zeros((width, orders, count))
        reads_PE, earlier_PE, made_PE = self._reads
        last_E, plane = self._last_E, orders * count
        began = reads_PE + np.arange(orders)[:, None] * count
        # pieces that begin in (earlier, r] pay, which is d from 0 to r − earlier − 1 …
        ended_D = reads_PE - earlier_PE
        # … and those that hold the producer no longer pay: d from r − made on
        kept_D = (reads_PE - made_PE)[:, last_E]
        pays, stops, keeps = np.ones_like(began, dtype=bool), ended_D < width, kept_D < width
        size_PE = np.broadcast_to(self._size_E, began.shape)
        where = (began[pays], (ended_D * plane + began)[stops], (kept_D * plane + began[:, last_E])[keeps])
        amount = (size_PE[pays], -size_PE[stops], -size_PE[:, last_E][keeps])
        sums = np.bincount(np.concatenate(where), np.concatenate(amount), minlength=width * plane)
        return sums.astype(np.float64, copy=False).reshape(width, orders, count)


def segment_costs(graph: OperatorGraph, order_V: Ints, fleet: Fleet) -> Floats:
    """f(l..r) of every piece of the order, both ends included, at [l, r]; inf where l > r. O(V² + E)."""
    count = graph.count
    band_DPV = Segments(graph, order_V[None], fleet).band(count)
    cost_VV = np.full((count, count), math.inf)
    for d in range(count):
        cost_VV[np.arange(count - d), np.arange(d, count)] = band_DPV[d, 0, d:]
    return cost_VV
