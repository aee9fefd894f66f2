"""Lower bounds of what any partition of a graph costs on a fleet. The best of them is the proof beside every plan.

counted   all work and all that cannot fit, shared evenly
heaviest  the least any part can cost that holds some operator: a minimum cut
crowded   two of the k + 1 largest operators share a part
seeded    every part that holds v pays at least φ(v) io per second of work, so that operators are larger than their work
windows   see prefix_bounds
exact     every prefix of a narrow graph was looked at: the optimum, within PRECISION
model     of small graphs, see partition_model

φ(v): let M(a) be the least of io(S) + a·w(S) over all S that hold v. A part within the bottleneck T has w + io ≤ T, so
io/w ≥ (M(a) − a·T) / (T − M(a)) for every slope a. M does not depend on k, and serves all fleets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bsns.planning.graph import Fleet, Floats, OperatorGraph, part_costs
from bsns.planning.min_cuts import MAX_OPERATORS, ancestors, seeded_cuts
from bsns.planning.partition_model import MAX_OPERATORS as MAX_MODELLED
from bsns.planning.partition_model import solve
from bsns.planning.prefix_bounds import Windows
from bsns.planning.prefixes import Prefixes, all_prefixes

CHAINLIKE = 4
"""Prefixes per operator, up to which looking at all of them is faster than anything else."""
MODEL_EFFORT = 1.0
"""Of CP-SAT, about seconds."""
PRECISION = 1e-4
"""How near, in parts of the bottleneck, bounds found by bisection come to the best of their kind."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No partition has a bottleneck below `value_s`; `reason` is the strongest argument's name."""

    value_s: float
    reason: str
    part_of: tuple[int, ...] | None = None
    """A partition better than the one that was known, where the argument came by one."""


class Bounds:
    """Bounds for one graph, keeping what is the same for all fleets."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        self._cuts: dict[tuple[float, float], Floats] = {}
        self._heaviest: dict[float, tuple[float, Floats]] = {}
        self._reach_VV: Floats | None = None
        self._prefixes_IV: NDArray[np.bool_] | None = None

    def quick(self, fleet: Fleet) -> Bound:
        """The best bound that takes no search: counted, heaviest or crowded."""
        graph, k = self.graph, fleet.machines
        over_s = self._overflow_s(fleet)
        found = [Bound((float(graph.work_V.sum()) + over_s) / k, "counted")]
        if graph.count > k:
            largest = np.sort(graph.work_V)[::-1]
            found.append(Bound(float(largest[k - 1] + largest[k]), "crowded"))
        if graph.count > 1 and k > 1:
            found.append(Bound(self._heaviest_s(fleet.bytes_per_s, max(bound.value_s for bound in found)), "heaviest"))
        return max(found, key=lambda bound: bound.value_s)

    def lower(self, fleet: Fleet, at_most_s: float, should_stop: Callable[[], bool] = lambda: False) -> Bound:
        """The best bound, or the best before it had to stop. `at_most_s` is the bottleneck of a known partition;
        nothing is looked for beyond it."""
        best = self.quick(fleet)
        part_of: tuple[int, ...] | None = None
        if fleet.machines > 1 and 1 < self.graph.count <= MAX_OPERATORS and best.value_s < at_most_s * (1 - 1e-9):
            chainlike = 0 < len(self._prefixes()) <= CHAINLIKE * self.graph.count
            arguments = (self._windows, self._exact, self._model)
            for argue in arguments if chainlike else (self._seeded, *arguments):
                if best.value_s >= at_most_s * (1 - PRECISION) or should_stop():
                    break
                found = argue(fleet, best.value_s, at_most_s, should_stop)
                if found.part_of is not None:
                    part_of = found.part_of
                    at_most_s = min(at_most_s, float(part_costs(self.graph, part_of, fleet).max()))
                best = max(best, found, key=lambda bound: bound.value_s)
        return replace(best, value_s=min(best.value_s, at_most_s), part_of=part_of)

    def sizes(self, fleet: Fleet, limit_s: float) -> Floats:
        """Work and the io that comes with it at least: no part within the limit holds more than the limit of these."""
        phi_V = np.zeros(self.graph.count)
        for (bytes_per_s, slope), cut_V in self._cuts.items():
            if bytes_per_s == fleet.bytes_per_s:
                room_V = limit_s - cut_V
                ratio_V = (cut_V - slope * limit_s) / np.maximum(room_V, 1e-300)
                phi_V = np.maximum(phi_V, np.where(room_V > 0, ratio_V, math.inf))
        work_V = self.graph.work_V
        sizes_V: Floats = np.where(work_V > 0, work_V * (1 + np.where(work_V > 0, phi_V, 0.0)), 0.0)
        return sizes_V

    def windows(self, fleet: Fleet, limit_s: float) -> Windows:
        """Which parts each operator can be in within the limit."""
        if self._reach_VV is None:
            self._reach_VV = ancestors(self.graph)
        io_V = self.graph.sent_V / fleet.bytes_per_s
        windows = Windows(self.graph, self._reach_VV, io_V, fleet.machines, limit_s)
        windows.narrow([self.graph.work_V, self.sizes(fleet, limit_s)])
        return windows

    def _overflow_s(self, fleet: Fleet) -> float:
        if math.isinf(fleet.memory_bytes) or fleet.hard_memory:
            return 0.0
        return max(float(self.graph.param_V.sum()) - fleet.machines * fleet.memory_bytes, 0.0) / fleet.bytes_per_s

    def _heaviest_s(self, bytes_per_s: float, known_s: float) -> float:
        """The largest of M(1), looked for among operators that alone cost more than what is known."""
        graph, io_V = self.graph, self.graph.sent_V / bytes_per_s
        best_s, done = self._heaviest.get(bytes_per_s, (0.0, np.zeros(graph.count, dtype=bool)))
        alone_V = graph.work_V + io_V
        np.add.at(alone_V, graph.edges_E2[:, 1], io_V[graph.edges_E2[:, 0]])
        for v in np.argsort(-alone_V, kind="stable").tolist():
            if alone_V[v] <= max(best_s, known_s):
                break
            if not done[v]:
                done[v] = True
                best_s = max(best_s, float(seeded_cuts(graph, io_V, 1.0, [v])[0]))
        self._heaviest[bytes_per_s] = best_s, done
        return min(best_s, float(graph.work_V.sum()))

    def _seeded(self, fleet: Fleet, low_s: float, high_s: float, should_stop: Callable[[], bool]) -> Bound:
        graph, k = self.graph, fleet.machines
        total_s = float(graph.work_V.sum())
        # with io spread evenly, the best slope is the share of io in the bottleneck, divided by k
        share = max(high_s * k / total_s - 1, 1e-6)
        for step in range(3):
            slope = 2.0 ** (math.floor(math.log2(share / k)) - step + 1)
            if (fleet.bytes_per_s, slope) not in self._cuts and slope <= 1:
                io_V = graph.sent_V / fleet.bytes_per_s
                self._cuts[fleet.bytes_per_s, slope] = seeded_cuts(graph, io_V, slope, range(graph.count))
        over_s = self._overflow_s(fleet)
        low, high = low_s, high_s
        while high - low > 1e-6 * high_s:
            middle = (low + high) / 2
            if float(self.sizes(fleet, middle).sum()) + over_s > k * middle:
                low = middle
            else:
                high = middle
        return Bound(low, "seeded")

    def _windows(self, fleet: Fleet, low_s: float, high_s: float, should_stop: Callable[[], bool]) -> Bound:
        low, high = low_s, high_s
        while high - low > PRECISION * high_s and not should_stop():
            middle = (low + high) / 2
            if self.windows(fleet, middle).empty:
                low = middle
            else:
                high = middle
        return Bound(low, "windows")

    def _exact(self, fleet: Fleet, low_s: float, high_s: float, should_stop: Callable[[], bool]) -> Bound:
        if not len(self._prefixes()):
            return Bound(0.0, "exact")
        prefixes = Prefixes(self.graph, self._prefixes(), fleet)
        best: tuple[int, ...] | None = None
        low, high = low_s, high_s
        at_s = high_s * (1 - PRECISION)  # most often what is known is the best
        while high - low > PRECISION * high_s and not should_stop():
            windows = self.windows(fleet, at_s)
            part_V = None if windows.empty else prefixes.within(windows, should_stop)
            if should_stop():
                break
            if part_V is None:
                low = at_s
            else:
                best = tuple(part_V.tolist())
                high = float(part_costs(self.graph, part_V, fleet).max())
            at_s = (low + high) / 2
        return Bound(low, "exact", best)

    def _model(self, fleet: Fleet, low_s: float, high_s: float, should_stop: Callable[[], bool]) -> Bound:
        if self.graph.count > MAX_MODELLED or math.isfinite(fleet.memory_bytes):
            return Bound(0.0, "model")
        windows = self.windows(fleet, high_s)
        solved = solve(self.graph, fleet, high_s, windows.early_V, windows.late_V, low_s=low_s, effort=MODEL_EFFORT)
        better = solved.part_of
        if better is not None and float(part_costs(self.graph, better, fleet).max()) >= high_s * (1 - 1e-9):
            better = None
        return Bound(solved.lower_s, "model", better)

    def _prefixes(self) -> NDArray[np.bool_]:
        """All of them, or none where they are too many."""
        if self._prefixes_IV is None:
            self._prefixes_IV = all_prefixes(self.graph)
            if self._prefixes_IV is None:
                self._prefixes_IV = np.zeros((0, self.graph.count), dtype=bool)
        return self._prefixes_IV
