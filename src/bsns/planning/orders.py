"""Natural orders: the topological orders of a graph that people would write down, to start searching from."""

from __future__ import annotations

import numpy as np

from bsns.planning.graph import Floats, Ints, OperatorGraph, kahn, kahn_orders


def natural_orders(graph: OperatorGraph) -> dict[str, Ints]:
    """Name → order. `breadth first` follows depth, `late` the way to the end, `depth first` the last result; `frugal`
    holds the fewest bytes that are still to be read; `smooth` keeps every operator near its neighbours."""
    count = graph.count
    late_V = np.zeros(count)
    for v in reversed(kahn(graph, range(count))):
        late_V[v] = max([late_V[c] + 1 for c in graph.consumers[v]], default=0.0)
    keys = {
        "as given": np.arange(count, dtype=np.float64),
        "breadth first": graph.depth_V.astype(np.float64),
        "late": -late_V,
        "between": graph.depth_V - late_V,
        "smooth": _smoothed(graph, graph.depth_V - late_V),
    }
    orders = dict(zip(keys, kahn_orders(graph, np.stack(list(keys.values()))), strict=True))
    return orders | {
        "depth first": np.array(_depth_first(graph, reverse=False), dtype=np.intp),
        "depth first, other side": np.array(_depth_first(graph, reverse=True), dtype=np.intp),
        "frugal": np.array(_frugal(graph), dtype=np.intp),
    }


def keys_of(orders_PV: Ints) -> Floats:
    """Keys (P, V) in [0, 1) from which Kahn's algorithm gives these orders again."""
    count = orders_PV.shape[1]
    keys_PV = np.empty(orders_PV.shape)
    np.put_along_axis(keys_PV, orders_PV, np.broadcast_to(np.arange(count) / count, orders_PV.shape), axis=1)
    return keys_PV


def lined_up(graph: OperatorGraph, part_V: Ints, order_V: Ints) -> Ints:
    """The order that takes part after part, and within a part follows `order_V`. Parts are numbered in order."""
    place_V = np.empty(graph.count)
    place_V[order_V] = np.arange(graph.count)
    ordered: Ints = kahn_orders(graph, (part_V * graph.count + place_V)[None])[0]
    return ordered


def _smoothed(graph: OperatorGraph, start_V: Floats, rounds: int = 60) -> Floats:
    """Each operator where its neighbours are on average, weighted by what passes between them; ends held apart."""
    if not len(graph.edges_E2):
        return start_V
    from_E, to_E = graph.edges_E2.T
    weight_E = graph.sent_V[from_E] + 1e-12 * (1 + graph.sent_V.max())
    count = graph.count
    total_V = np.bincount(from_E, weight_E, count) + np.bincount(to_E, weight_E, count)
    at_V = start_V.astype(np.float64)
    for _ in range(rounds):
        pulled_V = np.bincount(from_E, weight_E * at_V[to_E], count) + np.bincount(to_E, weight_E * at_V[from_E], count)
        at_V = 0.1 * start_V + 0.9 * np.where(total_V > 0, pulled_V / np.maximum(total_V, 1e-300), at_V)
    return at_V


def _depth_first(graph: OperatorGraph, *, reverse: bool) -> list[int]:
    """Always the operator that became ready last."""
    waits = [len(producers) for producers in graph.producers]
    ready = [v for v in range(graph.count) if not waits[v]]
    if not reverse:
        ready.reverse()
    order = []
    while ready:
        v = ready.pop()
        order.append(v)
        consumers = graph.consumers[v]
        for c in consumers if reverse else reversed(consumers):
            waits[c] -= 1
            if not waits[c]:
                ready.append(c)
    return order


def _frugal(graph: OperatorGraph) -> list[int]:
    """Always the ready operator that adds least to the bytes still to be read; of equals the last that became so."""
    sent = graph.sent_V.tolist()
    waits = [len(producers) for producers in graph.producers]
    unread = [len(consumers) for consumers in graph.consumers]
    ready = {v: None for v in range(graph.count) if not waits[v]}
    order = []
    while ready:
        least, chosen = 0.0, -1
        for v in reversed(ready):
            adds = sent[v] - sum(sent[u] for u in graph.producers[v] if unread[u] == 1)
            if chosen < 0 or adds < least:
                least, chosen = adds, v
        del ready[chosen]
        order.append(chosen)
        for u in graph.producers[chosen]:
            unread[u] -= 1
        for c in graph.consumers[chosen]:
            waits[c] -= 1
            if not waits[c]:
                ready[c] = None
    return order
