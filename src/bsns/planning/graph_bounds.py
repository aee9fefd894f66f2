"""Lower bounds of what any partition of a graph costs on a fleet."""

from __future__ import annotations

from bsns.planning.graph import Fleet, OperatorGraph


class Bounds:
    """Bounds for one graph, keeping what is the same for all fleets."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph

    def lower_s(self, fleet: Fleet, at_most_s: float) -> float:
        """No partition has a lower bottleneck. `at_most_s`: that of a known partition, beyond which nobody looks."""
        counted_s = max(float(self.graph.work_V.sum()) / fleet.machines, float(self.graph.work_V.max()))
        return min(counted_s, at_most_s)
