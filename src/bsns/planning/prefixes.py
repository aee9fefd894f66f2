"""Prefixes: all of a narrow graph's, and with them the exact optimum.

Parts computed one after another end at prefixes: sets that hold every producer of what they hold. Graphs near a chain
have few (a layer with three parallel operators has eight), and then a shortest way from none to all of them, over
pieces within a bottleneck, decides whether it can be reached. That is SliceGraph over all topological orders at once.

Suffixes say the axes: I prefixes, V operators, W words of 64 operators, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bsns.planning.graph import Fleet, Floats, Ints, OperatorGraph
from bsns.planning.prefix_bounds import Windows

MAX_PREFIXES = 40_000


def all_prefixes(graph: OperatorGraph, most: int = MAX_PREFIXES) -> NDArray[np.bool_] | None:
    """Every prefix (I, V), sorted by work, those within others first; none if there are more than `most`."""
    bit = [1 << v for v in range(graph.count)]
    needs = [sum(bit[u] for u in producers) for producers in graph.producers]
    sources = tuple(v for v in range(graph.count) if not needs[v])
    found: list[int] = [0]
    grown: dict[int, tuple[int, ...]] = {0: sources}
    while grown:
        larger: dict[int, tuple[int, ...]] = {}
        for prefix, ready in grown.items():
            for v in ready:
                whole = prefix | bit[v]
                if whole not in larger:
                    came = tuple(c for c in graph.consumers[v] if needs[c] & ~whole == 0)
                    larger[whole] = tuple(u for u in ready if u != v) + came
            if len(found) + len(larger) > most:
                return None
        found += larger
        grown = larger
    length = (graph.count + 7) // 8
    packed = np.frombuffer(b"".join(prefix.to_bytes(length, "little") for prefix in found), dtype=np.uint8)
    holds_IV = np.unpackbits(packed.reshape(-1, length), axis=1, bitorder="little")[:, : graph.count].astype(bool)
    return holds_IV[np.lexsort((holds_IV.sum(axis=1), holds_IV @ graph.work_V))]


class Prefixes:
    """All prefixes of a graph on a fleet, and which pieces between them cost what."""

    def __init__(self, graph: OperatorGraph, holds_IV: NDArray[np.bool_], fleet: Fleet) -> None:
        self.graph, self.fleet, self.holds_IV = graph, fleet, holds_IV
        self.io_V = graph.sent_V / fleet.bytes_per_s
        self.work_I = holds_IV @ graph.work_V
        self.param_I = holds_IV @ graph.param_V
        words = -(-graph.count // 64)
        padded = np.zeros((len(holds_IV), words * 64), dtype=bool)
        padded[:, : graph.count] = holds_IV
        self.words_IW = np.packbits(padded, axis=1, bitorder="little").view(np.uint64)
        self.crossing_IV = np.zeros_like(holds_IV)
        for v, consumers in enumerate(graph.consumers):
            if consumers and self.io_V[v] > 0:
                self.crossing_IV[:, v] = holds_IV[:, v] & ~holds_IV[:, list(consumers)].all(axis=1)
        self.out_I = self.crossing_IV @ self.io_V

    def within(self, windows: Windows, should_stop: Callable[[], bool] = lambda: False) -> Ints | None:
        """A partition within the windows' limit; none if there is none, or if it had to stop. Exact."""
        count, limit_s = len(self.work_I), windows.limit_s * (1 + 1e-9)
        from_I = np.full(count, -1, dtype=np.intp)
        from_I[0] = 0
        frontier = np.zeros(1, dtype=np.intp)
        for b in range(1, windows.parts + 1):
            # any prefix that b parts can end at lies in their window; where fewer do, all that follows is as good
            ends_C = self._allowed(windows, b)
            ends_C = ends_C[from_I[ends_C] < 0]
            for i in frontier.tolist():
                if should_stop():
                    return None
                last = int(np.searchsorted(self.work_I[ends_C], self.work_I[i] + limit_s, side="right"))
                some_C = ends_C[int(np.searchsorted(ends_C, i)) : last]
                some_C = some_C[from_I[some_C] < 0]
                larger_C = ~(~self.words_IW[some_C] & self.words_IW[i]).any(axis=1)
                some_C = some_C[larger_C]
                from_I[some_C[self._costs(i, some_C) <= limit_s]] = i
            frontier = ends_C[from_I[ends_C] >= 0]
            if from_I[-1] >= 0:
                break
        else:
            return None
        part_V = np.zeros(self.graph.count, dtype=np.intp)
        end = int(from_I[-1])
        while end:
            part_V += ~self.holds_IV[end]
            end = int(from_I[end])
        return part_V

    def _allowed(self, windows: Windows, b: int) -> Ints:
        """Prefixes that b parts may end at."""
        start = int(np.searchsorted(self.work_I, windows.least_J[b], side="left"))
        end = int(np.searchsorted(self.work_I, windows.most_J[b], side="right"))
        must, cannot = np.flatnonzero(windows.late_V <= b), np.flatnonzero(windows.early_V > b)
        holds_CV = self.holds_IV[start:end]
        allowed_C = holds_CV[:, must].all(axis=1) & ~holds_CV[:, cannot].any(axis=1)
        return start + np.flatnonzero(allowed_C)

    def _costs(self, i: int, ends_C: Ints) -> Floats:
        """f of the pieces from prefix i to each of the others, all of which hold it."""
        cost_C: Floats = self.work_I[ends_C] - self.work_I[i] + self.out_I[ends_C]
        for v in np.flatnonzero(self.crossing_IV[i]).tolist():
            beyond = [c for c in self.graph.consumers[v] if not self.holds_IV[i, c]]
            read_C = (
                self.holds_IV[ends_C, beyond[0]] if len(beyond) == 1 else self.holds_IV[ends_C][:, beyond].any(axis=1)
            )
            # comes in where it is read; goes out of no piece that does not make it
            cost_C += self.io_V[v] * (read_C.astype(np.float64) - self.crossing_IV[ends_C, v])
        if math.isfinite(self.fleet.memory_bytes):
            needed_C = self.param_I[ends_C] - self.param_I[i]
            if self.graph.peak_V.any():
                needed_C += np.where(self.holds_IV[ends_C] & ~self.holds_IV[i], self.graph.peak_V, 0.0).max(axis=1)
            cost_C += self.fleet.overflow_s(needed_C)
        return cost_C
