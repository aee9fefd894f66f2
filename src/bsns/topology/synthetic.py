"""Synthetic swarms: random snapshots of three shapes, for benchmarks, tests and schema libraries.

lan_wan     clusters with round trips of 0.1–1 ms and 1–10 Gbit/s, joined by ways of 10–80 ms and 50–500 Mbit/s
scale_free  a backbone grown by preferential attachment (Barabási & Albert, Science 286, 1999); a link is the shortest
            way along it, as narrow as that way's narrowest edge
uniform     points in a square: the round trip grows with the distance, the narrower end's access sets the bandwidth
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import KDTree

from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.core.snapshot import Link, NodeView, Snapshot

Kind = Literal["lan_wan", "scale_free", "uniform"]
KINDS: tuple[Kind, ...] = ("lan_wan", "scale_free", "uniform")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DENSE_NODES = 300
"""Up to so many nodes every link counts as measured."""
SPARSE_LINKS = 16
"""Measured links of a node on average, beyond."""
MOST_STAGES = 16
"""A model does not need more nodes than this, however many there are."""
SPARE_MEMORY = 1.25
"""For what does not divide evenly, and for caches."""
GBIT_S = 1e9 / 8
BLOCK_S = 5e-3
ATTACHED = 2
"""Edges with which a node joins the backbone."""
LANDMARKS = 64
"""Of a sparse scale-free swarm: the far links end at these, so that few shortest-path trees are enough."""


def synthetic(
    kind: Kind,
    nodes: int,
    rng: np.random.Generator,
    *,
    model_bytes: float = 16e9,
    dense: bool | None = None,
) -> Snapshot:
    """A random swarm of `nodes` unequal nodes, without a client. Equal generators give equal swarms.

    Block times are log-uniform within a factor 10 around 5 ms. Memories differ by a factor 6; about a third of the
    nodes (at most 16) hold a model of `model_bytes`. Beyond 300 nodes, or with `dense=False`, each node has measured
    about 16 links only, near ones and a few random ones. Raises BadOption.
    """
    if kind not in KINDS:
        raise BadOption(f"there is no kind of swarm {kind!r}; use {', '.join(KINDS)}")
    if nodes < 1:
        raise BadOption(f"a swarm of {nodes} nodes is none; ask for at least 1")
    if not 0 < model_bytes < np.inf:
        raise BadOption(f"a model of {model_bytes} bytes is none")
    if dense is None:
        dense = nodes <= DENSE_NODES
    block_time_N = BLOCK_S * 10 ** rng.uniform(-0.5, 0.5, nodes)
    needed = min(max(nodes / 3, 1.0), MOST_STAGES)
    share_N = 6 ** rng.uniform(-0.5, 0.5, nodes)
    memory_N = SPARE_MEMORY * model_bytes / needed * share_N / share_N.mean()
    make = {"lan_wan": _lan_wan, "scale_free": _scale_free, "uniform": _uniform}[kind]
    pairs_E2, round_trip_E, bytes_E = make(nodes, rng, dense)
    peers = [PeerId(f"n{number:07d}") for number in range(nodes)]
    views = tuple(
        NodeView(peer, block_time_s, int(memory_bytes), prefill_time_s=block_time_s / 8)
        for peer, block_time_s, memory_bytes in zip(peers, block_time_N.tolist(), memory_N.tolist(), strict=True)
    )
    links = {
        (peers[a], peers[b]): Link(round_trip_s, bytes_per_s)
        for (a, b), round_trip_s, bytes_per_s in zip(
            pairs_E2.tolist(), round_trip_E.tolist(), bytes_E.tolist(), strict=True
        )
    }
    return Snapshot(0.0, views, MappingProxyType(links))


Drawn = tuple[Ints, Floats, Floats]
"""Pairs (E, 2) of node numbers, the smaller first; round trips (E,); bytes per second (E,)."""


def _lan_wan(nodes: int, rng: np.random.Generator, dense: bool) -> Drawn:
    size = 3 * 10 ** rng.uniform()
    clusters = min(max(round(nodes / size), 2), nodes)
    cluster_N = rng.permutation(np.arange(nodes) % clusters)
    place_C2 = rng.random((clusters, 2))
    lan_C = GBIT_S * 10 ** rng.uniform(0, 1, clusters)
    pairs_E2 = _all_pairs(nodes) if dense else _near_in_order(np.argsort(cluster_N, kind="stable"), rng)
    one_E, other_E = cluster_N[pairs_E2[:, 0]], cluster_N[pairs_E2[:, 1]]
    count = len(pairs_E2)
    apart_E = np.hypot(*(place_C2[one_E] - place_C2[other_E]).T) / np.sqrt(2)
    wan_s_E = np.clip((10e-3 + 70e-3 * apart_E) * rng.uniform(0.95, 1.05, count), 10e-3, 80e-3)
    lan_s_E = 0.1e-3 * 10 ** rng.uniform(0, 1, count)
    # One figure for each two clusters, the same both ways: their sites' narrower uplink.
    uplink_C = 0.05 * GBIT_S * 10 ** rng.uniform(0, 1, clusters)
    same_E = one_E == other_E
    return (
        pairs_E2,
        np.where(same_E, lan_s_E, wan_s_E),
        np.where(same_E, lan_C[one_E], np.minimum(uplink_C[one_E], uplink_C[other_E])),
    )


def _uniform(nodes: int, rng: np.random.Generator, dense: bool) -> Drawn:
    place_N2 = rng.random((nodes, 2))
    access_N = 0.05 * GBIT_S * 20 ** rng.uniform(0, 1, nodes)
    if dense:
        pairs_E2 = _all_pairs(nodes)
    else:
        near = min(6, nodes - 1)
        nearest_NK = KDTree(place_N2).query(place_N2, k=near + 1)[1].reshape(nodes, near + 1)
        pairs_E2 = _distinct(np.repeat(np.arange(nodes), near + 1), nearest_NK.ravel(), *_random_pairs(nodes, 4, rng))
    one_E, other_E = pairs_E2.T
    apart_E = np.hypot(*(place_N2[one_E] - place_N2[other_E]).T)
    return pairs_E2, 0.5e-3 + 60e-3 * apart_E, np.minimum(access_N[one_E], access_N[other_E])


def _scale_free(nodes: int, rng: np.random.Generator, dense: bool) -> Drawn:
    place_N2 = rng.random((nodes, 2))
    edges_E2 = _backbone(nodes, rng)
    one_E, other_E = edges_E2.T
    # Distances in a plane plus a constant: no way around is shorter than an edge.
    edge_s_E = 1e-3 + 40e-3 * np.hypot(*(place_N2[one_E] - place_N2[other_E]).T)
    width_E = 0.1 * GBIT_S * 100 ** rng.uniform(0, 1, len(edges_E2))
    if nodes == 1:
        return edges_E2, edge_s_E, width_E
    sources_S = np.arange(nodes) if dense else np.sort(rng.choice(nodes, min(LANDMARKS, nodes), replace=False))
    round_trip_SN, width_SN = _ways(nodes, edges_E2, edge_s_E, width_E, sources_S)
    if dense:
        pairs_P2 = _all_pairs(nodes)
        return pairs_P2, round_trip_SN[tuple(pairs_P2.T)], width_SN[tuple(pairs_P2.T)]
    far = SPARSE_LINKS // 2 - ATTACHED
    number_P = rng.integers(len(sources_S), size=nodes * far)
    near_P2, node_P = edges_E2, np.repeat(np.arange(nodes), far)
    ends_Q2 = np.concatenate([near_P2, np.column_stack([sources_S[number_P], node_P])])
    round_trip_Q = np.concatenate([edge_s_E, round_trip_SN[number_P, node_P]])
    width_Q = np.concatenate([width_E, width_SN[number_P, node_P]])
    ends_Q2 = np.sort(ends_Q2, axis=1)
    _, first_Q = np.unique(ends_Q2[:, 0] * nodes + ends_Q2[:, 1], return_index=True)
    first_Q = first_Q[ends_Q2[first_Q, 0] < ends_Q2[first_Q, 1]]
    return ends_Q2[first_Q], round_trip_Q[first_Q], width_Q[first_Q]


def _backbone(nodes: int, rng: np.random.Generator) -> Ints:
    """Edges (E, 2): each node joins two others, drawn by how many edges they have."""
    ends: list[int] = [0]
    edges: list[tuple[int, int]] = []
    draws_NK = rng.random((nodes, 2 * ATTACHED))
    for node in range(1, nodes):
        chosen = list(dict.fromkeys(ends[int(draw * len(ends))] for draw in draws_NK[node]))
        for other in chosen[:ATTACHED]:
            edges.append((other, node))
            ends += (other, node)
    return np.array(edges, dtype=np.int64).reshape(-1, 2)


def _ways(nodes: int, edges_E2: Ints, edge_s_E: Floats, width_E: Floats, sources_S: Ints) -> tuple[Floats, Floats]:
    """Round trips (S, N) of the shortest ways along the edges, and their narrowest edges' widths (S, N)."""
    one_E, other_E = edges_E2.T
    graph = coo_array((edge_s_E, (one_E, other_E)), shape=(nodes, nodes)).tocsr()
    round_trip_SN, before_SN = dijkstra(graph, directed=False, indices=sources_S, return_predecessors=True)
    key_E = one_E * nodes + other_E
    sorted_E = np.argsort(key_E)
    order_SN = np.argsort(round_trip_SN, axis=1, kind="stable")
    width_SN = np.full((len(sources_S), nodes), np.inf)
    row_S = np.arange(len(sources_S))
    for rank in range(1, nodes):
        node_S = order_SN[:, rank]
        before_S = before_SN[row_S, node_S].astype(np.int64)
        key_S = np.minimum(node_S, before_S) * nodes + np.maximum(node_S, before_S)
        edge_S = sorted_E[np.searchsorted(key_E, key_S, sorter=sorted_E)]
        width_SN[row_S, node_S] = np.minimum(width_SN[row_S, before_S], width_E[edge_S])
    return np.asarray(round_trip_SN), width_SN


def _all_pairs(nodes: int) -> Ints:
    return np.column_stack(np.triu_indices(nodes, 1)).astype(np.int64)


def _near_in_order(order_N: Ints, rng: np.random.Generator) -> Ints:
    """Pairs of nodes that stand near each other in a circular order, and a few random ones."""
    nodes = len(order_N)
    near = min(5, max(nodes - 1, 0))
    one = np.tile(order_N, near)
    other = np.concatenate([np.roll(order_N, -step) for step in range(1, near + 1)] or [order_N[:0]])
    return _distinct(one, other, *_random_pairs(nodes, 3, rng))


def _random_pairs(nodes: int, each: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    return np.repeat(np.arange(nodes), each), rng.integers(nodes, size=nodes * each)


def _distinct(*ends: Ints) -> Ints:
    """The pairs in `ends` (one, other, one, other …), each once, the smaller number first, none with itself."""
    one, other = np.concatenate(ends[0::2]), np.concatenate(ends[1::2])
    pairs_E2 = np.unique(np.column_stack([np.minimum(one, other), np.maximum(one, other)]), axis=0)
    return pairs_E2[pairs_E2[:, 0] < pairs_E2[:, 1]].astype(np.int64)
