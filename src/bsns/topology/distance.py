"""Distances between a swarm's nodes: how long one token's activations take from one to the other.

d_ij = delay + activation bytes / bandwidth, the same in both directions. Suffixes: N nodes of the snapshot, M of them
kept (a sample of a large swarm), E measured links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from bsns.core.errors import BadSnapshot
from bsns.core.snapshot import ASSUMED_LINK, ASSUMED_WORDS, Link, NodeView, Pair, Snapshot, check_node, pair, slower

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REFERENCE_BYTES = 8192
"""One token's hidden state of 4096 numbers, two bytes each."""
MOST_POINTS = 200
"""Persistence looks at no more nodes than this."""
SHORTEST_S = 1e-9
"""A measured link of no length still is a link: sparse graphs hold no zeros."""


@dataclass(frozen=True, slots=True)
class Distances:
    """`matrix_MM` is symmetric, finite, zero on its diagonal; row m is the snapshot's node number `index_M[m]`."""

    matrix_MM: Floats
    index_M: Ints
    node_count: int
    """Of the whole swarm."""
    radius_s: float = 0.0
    """No node that was left out is farther than this from one that was kept."""
    assumptions: tuple[str, ...] = ()


def distances(snapshot: Snapshot, *, size_bytes: float = REFERENCE_BYTES, most: int = MOST_POINTS) -> Distances:
    """The distances between the nodes, or between `most` that lie well spread over a larger swarm.

    The sample is a greedy permutation: each next node is the one farthest from those before it (Gonzalez, Theoretical
    Computer Science 38, 1985); it begins with the fastest node. A link that was not measured counts as the shortest way
    over those that were, nodes that no way joins as lying apart as far as any two known ones, and every link as
    `ASSUMED_LINK` where none was measured; `assumptions` says so. Raises BadSnapshot for a swarm without nodes and for
    impossible figures.
    """
    count = len(snapshot.nodes)
    if not count:
        raise BadSnapshot("the snapshot has no nodes; start some with bsns serve")
    for node in snapshot.nodes:
        check_node(node)
    if not 0 <= size_bytes < math.inf or most < 1:
        raise BadSnapshot(f"activations of {size_bytes} bytes between {most} nodes have no distance")
    links, notes = _links(snapshot)
    graph = _graph(links, count, size_bytes)
    if count <= most:
        index_M = np.arange(count)
        matrix_MM, radius_s = _rows(graph, index_M), 0.0
    else:
        index_M, matrix_MM, radius_s = _spread(graph, _fastest(snapshot.nodes), most)
    possible = count * (count - 1) // 2
    missing = possible - len(links)
    if missing and links:
        notes.append(
            f"{missing} of {possible} links {'was' if missing == 1 else 'were'} not measured; each counts as the "
            "shortest way over those that were"
        )
    if np.isinf(matrix_MM).any():
        known_s = float(matrix_MM[np.isfinite(matrix_MM)].max())
        farthest_s = known_s or ASSUMED_LINK.transfer_s(size_bytes)
        matrix_MM = np.where(np.isinf(matrix_MM), farthest_s, matrix_MM)
        who = "no measured way joins some of the nodes; they" if links else "no link was measured; the nodes"
        far = "to lie as far apart as any two known" if known_s else f"to be joined by ways with {ASSUMED_WORDS}"
        notes.append(f"{who} are assumed {far}")
        radius_s = min(radius_s, farthest_s)
    if count > most:
        notes.append(
            f"of {count} nodes {most} that lie well spread stand for all; "
            f"the others are within {radius_s * 1e3:.3g} ms of one of them"
        )
    return Distances(symmetric(matrix_MM), index_M, count, radius_s, tuple(notes))


def symmetric(matrix_NN: Floats) -> Floats:
    """A matrix of distances with the larger of both directions in both places. Raises BadSnapshot."""
    matrix_NN = np.asarray(matrix_NN, dtype=np.float64)
    if matrix_NN.ndim != 2 or matrix_NN.shape[0] != matrix_NN.shape[1] or not matrix_NN.size:
        raise BadSnapshot(f"distances of shape {matrix_NN.shape} are no square matrix")
    if not (np.isfinite(matrix_NN).all() and (matrix_NN >= 0).all()):
        raise BadSnapshot("distances must be finite and not negative")
    result_NN = np.maximum(matrix_NN, matrix_NN.T)
    np.fill_diagonal(result_NN, 0.0)
    return result_NN


def _links(snapshot: Snapshot) -> tuple[dict[tuple[int, int], Link], list[str]]:
    """The links under the numbers of their ends, the smaller first; of two directions the slower counts."""
    index = {node.peer: number for number, node in enumerate(snapshot.nodes)}
    if len(index) < len(snapshot.nodes):
        raise BadSnapshot("two nodes of the snapshot have the same peer id")
    twice: set[Pair] = set()
    links: dict[tuple[int, int], Link] = {}
    for (one, other), link in snapshot.links.items():
        a, b = index.get(one), index.get(other)
        if a is None or b is None or a == b:
            continue
        if not (0 <= link.round_trip_s < math.inf and link.bytes_per_s > 0):
            raise BadSnapshot(f"a link has a round trip of {link.round_trip_s} s and {link.bytes_per_s} bytes/s")
        key = (a, b) if a < b else (b, a)
        if key in links and links[key] != link:
            twice.add(pair(one, other))
            link = slower(links[key], link)
        links[key] = link
    notes = [*snapshot.assumptions]
    if twice:
        notes.append(f"{len(twice)} links differ between their two directions; the slower figures count")
    return links, notes


def _graph(links: dict[tuple[int, int], Link], count: int, size_bytes: float) -> csr_array:
    """Both directions of every link, as seconds."""
    ends_E2 = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    seconds_E = np.array([max(link.transfer_s(size_bytes), SHORTEST_S) for link in links.values()], dtype=np.float64)
    one = np.concatenate([ends_E2[:, 0], ends_E2[:, 1]])
    other = np.concatenate([ends_E2[:, 1], ends_E2[:, 0]])
    return csr_array((np.concatenate([seconds_E, seconds_E]), (one, other)), shape=(count, count))


def _rows(graph: csr_array, index_M: Ints) -> Floats:
    """Distances (M, N) from some nodes to all: the measured link where there is one, else the shortest way, or inf."""
    count = graph.shape[0]
    direct_MN: Floats = graph[index_M].toarray()
    measured_MN = direct_MN > 0
    measured_MN[np.arange(len(index_M)), index_M] = True
    if measured_MN.all():
        return direct_MN
    way_MN = dijkstra(graph, directed=True, indices=index_M).reshape(len(index_M), count)
    row_MN: Floats = np.where(measured_MN, direct_MN, way_MN)
    return row_MN


def _spread(graph: csr_array, first: int, most: int) -> tuple[Ints, Floats, float]:
    """The numbers (M,) of nodes that lie well spread, their distances (M, M), and how far any other is from them."""
    index = [first]
    rows_MN = np.empty((most, graph.shape[0]))
    nearest_N = np.full(graph.shape[0], np.inf)
    for number in range(most):
        rows_MN[number] = _rows(graph, np.array([index[-1]]))[0]
        nearest_N = np.minimum(nearest_N, rows_MN[number])
        nearest_N[index] = -1.0
        if number + 1 < most:
            index.append(int(np.argmax(nearest_N)))
    index_M = np.array(index, dtype=np.int64)
    return index_M, rows_MN[:, index_M], float(max(nearest_N.max(), 0.0))


def _fastest(nodes: tuple[NodeView, ...]) -> int:
    """The node to begin with, the same however the nodes are numbered."""
    return min(range(len(nodes)), key=lambda n: (nodes[n].block_time_s, -nodes[n].memory_bytes, nodes[n].peer))
