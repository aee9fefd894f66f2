"""Minimum cuts: the least io of any part that holds a given operator, and of any prefix that lies between two others.

Both are minimum s–t cuts, since io is submodular: a producer pays where some consumer is on the other side, through a
helper node where it has several. Capacities are rounded down to integers, so that values never exceed the true ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python import max_flow

from bsns.planning.graph import Floats, Ints, OperatorGraph

SCALE = 1 << 40
"""Of capacities: the sum of everything that can be cut."""
FOREVER = 1 << 50
MAX_OPERATORS = 4000
"""Beyond this, ancestors take too much memory, and seeds too long."""


def seeded_cuts(graph: OperatorGraph, io_V: Floats, slope: float, seeds: Iterable[int]) -> Floats:
    """min over sets S that hold v of io(V∖S, S) + io(S, V∖S) + slope · w(S), for each seed v.

    `io_V` is what an operator's output costs to move, once.
    """
    weight_V = slope * graph.work_V
    total = 2 * float(io_V.sum()) + float(weight_V.sum())
    unit = SCALE / total if total > 0 else 1.0
    sink, helper = graph.count, graph.count + 1
    arcs: list[tuple[int, int, int]] = []
    for v, (weight, io) in enumerate(zip((weight_V * unit).tolist(), (io_V * unit).tolist(), strict=True)):
        arcs.append((v, sink, int(weight)))
        consumers = graph.consumers[v]
        if len(consumers) == 1:
            arcs += [(v, consumers[0], int(io)), (consumers[0], v, int(io))]
        elif consumers:
            goes_out, comes_in = helper, helper + 1
            helper += 2
            arcs += [(v, goes_out, int(io)), (comes_in, v, int(io))]
            for c in consumers:
                arcs += [(goes_out, c, FOREVER), (c, comes_in, FOREVER)]
    network = _network(arcs)
    cuts = []
    for v in seeds:
        assert network.solve(v, sink) == network.OPTIMAL
        cuts.append(network.optimal_flow() / unit)
    return np.array(cuts)


class PrefixCuts:
    """The least io across a prefix that holds the operators `inside` and none of those `outside`.

    A prefix holds every producer of what it holds. Each of `payers` pays `io_V` where one of its consumers is beyond.
    """

    def __init__(
        self,
        graph: OperatorGraph,
        io_V: Floats,
        inside_V: NDArray[np.bool_],
        outside_V: NDArray[np.bool_],
        payers: Ints,
    ) -> None:
        total = float(io_V[payers].sum())
        self._unit = SCALE / total if total > 0 else 1.0
        self._payers, self._io = payers, (io_V * self._unit).astype(np.int64)
        source, sink = graph.count, graph.count + 1
        # every operator that must be inside is the source, every one that must not is the sink
        node = np.where(inside_V, source, np.where(outside_V, sink, np.arange(graph.count))).tolist()
        helper = sink + 1
        arcs: list[tuple[int, int, int]] = []
        self._paying: list[int] = []
        for v in payers.tolist():
            tail = node[v]
            heads = {node[c] for c in graph.consumers[v]} - {source}
            head = next(iter(heads)) if len(heads) == 1 else helper
            self._paying.append(len(arcs))
            arcs.append((tail, head, int(self._io[v])))
            if head == helper:
                helper += 1
                arcs += [(head, other, FOREVER) for other in heads]
        free_V = ~(inside_V | outside_V)
        from_E, to_E = graph.edges_E2.T
        both_E = free_V[from_E] & free_V[to_E]
        arcs += [(c, u, FOREVER) for u, c in graph.edges_E2[both_E].tolist()]
        self._network = _network(arcs) if arcs else None
        self._source, self._sink = source, sink

    def least(self, paying: NDArray[np.bool_] | None = None) -> float:
        """The value of the cut; with `paying`, where only those of the payers pay."""
        if self._network is None:
            return 0.0
        io = self._io[self._payers]
        self._network.set_arcs_capacity(np.array(self._paying), io if paying is None else np.where(paying, io, 0))
        assert self._network.solve(self._source, self._sink) == self._network.OPTIMAL
        return float(self._network.optimal_flow() / self._unit)


def ancestors(graph: OperatorGraph) -> Floats:
    """1.0 at [v, u] where v needs u, itself included (V, V)."""
    reach_VV = np.eye(graph.count, dtype=bool)
    for v in np.argsort(graph.depth_V, kind="stable").tolist():
        for u in graph.producers[v]:
            reach_VV[v] |= reach_VV[u]
    return reach_VV.astype(np.float64)


def _network(arcs: list[tuple[int, int, int]]) -> max_flow.SimpleMaxFlow:
    tails, heads, capacities = np.array(arcs, dtype=np.int64).T
    network = max_flow.SimpleMaxFlow()
    network.add_arcs_with_capacity(tails.astype(np.int32), heads.astype(np.int32), capacities)
    return network
