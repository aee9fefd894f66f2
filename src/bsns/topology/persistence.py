"""Persistent homology of a swarm: at which distances its clusters merge (H0) and its loops open and close (H1).

Vietoris–Rips: two nodes are joined once their distance is reached, a set of nodes once all its pairs are. Loops by
ripser (Bauer, J. Applied and Computational Topology 5, 2021), which keeps single precision; clusters by the minimum
spanning tree and the elder rule. In the node-weighted form nodes enter late that are slow or small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ripser import ripser

from bsns.core.errors import BadSnapshot
from bsns.core.snapshot import NodeView
from bsns.topology.distance import Floats, symmetric

Ints = NDArray[np.int64]

EMPTY_K2 = np.zeros((0, 2))
LEAST_MEMORY = 0.01
"""Of the median node's memory: one with less, or with none known, enters no later than one with this much."""


@dataclass(frozen=True, slots=True)
class Merge:
    """At `distance_s` the cluster of node `joins`, which had entered at `born_s`, becomes part of that of `stays`."""

    distance_s: float
    stays: int
    joins: int
    born_s: float


@dataclass(frozen=True, slots=True)
class Diagrams:
    """Points (K, 2) of birth and death in seconds, in order; points on the diagonal are left out.

    `h0` holds the one cluster that never dies, with an infinite death.
    """

    h0: Floats
    h1: Floats


def persistence(distance_NN: Floats, entry_N: Floats | None = None) -> Diagrams:
    """The diagrams of a swarm with these distances; nodes enter at `entry_N`, or all at once at 0.

    The matrix is made symmetric first, as ripser would take any without a word. Raises BadSnapshot.
    """
    distance_NN, entry_N = _checked(distance_NN, entry_N)
    h0 = [(merge.born_s, merge.distance_s) for merge in _merges(distance_NN, entry_N)]
    h0.append((float(entry_N.min()), np.inf))
    h1_K2 = EMPTY_K2
    if len(distance_NN) > 3:
        # Loops are born and filled by edges and triangles, which enter no earlier than their nodes: the entries of the
        # nodes themselves need not be told.
        found = ripser(_entered(distance_NN, entry_N), maxdim=1, distance_matrix=True)["dgms"][1]
        h1_K2 = np.asarray(found, dtype=np.float64).reshape(-1, 2)
    return Diagrams(_in_order(np.array(h0)), _in_order(h1_K2))


def merges(distance_NN: Floats, entry_N: Floats | None = None) -> list[Merge]:
    """How N clusters of one node become one, the nearest first. N − 1 merges. Raises BadSnapshot."""
    return _merges(*_checked(distance_NN, entry_N))


def clusters(distance_NN: Floats, distance_s: float) -> list[list[int]]:
    """The nodes that are joined, directly or over others, when `distance_s` is reached; the largest cluster first."""
    parent = list(range(len(distance_NN)))
    for merge in merges(distance_NN):
        if merge.distance_s <= distance_s:
            parent[_root(parent, merge.joins)] = _root(parent, merge.stays)
    groups: dict[int, list[int]] = {}
    for node in range(len(parent)):
        groups.setdefault(_root(parent, node), []).append(node)
    return sorted(groups.values(), key=lambda group: (-len(group), group))


def node_entries(nodes: Sequence[NodeView]) -> Floats:
    """When nodes enter the weighted filtration, in seconds: what a block takes, more for those of little memory.

    A node of the median memory enters at its block time, one of half that memory at twice its block time.
    """
    time_N = np.array([node.block_time_s for node in nodes], dtype=np.float64)
    memory_N = np.array([node.memory_bytes for node in nodes], dtype=np.float64)
    median = float(np.median(memory_N)) if len(memory_N) else 0.0
    if median <= 0:
        return time_N
    return time_N / np.maximum(memory_N / median, LEAST_MEMORY)


def _checked(distance_NN: Floats, entry_N: Floats | None) -> tuple[Floats, Floats]:
    distance_NN = symmetric(distance_NN)
    entry_N = np.zeros(len(distance_NN)) if entry_N is None else np.asarray(entry_N, dtype=np.float64)
    if entry_N.shape != distance_NN.shape[:1] or not (np.isfinite(entry_N).all() and (entry_N >= 0).all()):
        raise BadSnapshot("every node enters once, at a finite value that is not negative")
    return distance_NN, entry_N


def _entered(distance_NN: Floats, entry_N: Floats) -> Floats:
    """When edges enter: at their length, but no earlier than both ends."""
    edge_NN = np.maximum(distance_NN, np.maximum(entry_N[:, None], entry_N[None, :]))
    np.fill_diagonal(edge_NN, 0.0)
    return edge_NN


def _merges(distance_NN: Floats, entry_N: Floats) -> list[Merge]:
    """The elder rule along the minimum spanning tree: of two clusters the one that entered later ends."""
    parent = list(range(len(distance_NN)))
    result: list[Merge] = []
    for length_s, one, other in _spanning_tree(_entered(distance_NN, entry_N)):
        stays, joins = _root(parent, one), _root(parent, other)
        if (entry_N[stays], stays) > (entry_N[joins], joins):
            stays, joins = joins, stays
        parent[joins] = stays
        result.append(Merge(length_s, stays, joins, float(entry_N[joins])))
    return result


def _spanning_tree(edge_NN: Floats) -> list[tuple[float, int, int]]:
    """Its edges, the shortest first (Prim)."""
    count = len(edge_NN)
    nearest_N, from_N = edge_NN[0].copy(), np.zeros(count, dtype=np.int64)
    inside_N = np.zeros(count, dtype=bool)
    inside_N[0] = True
    tree: list[tuple[float, int, int]] = []
    for _ in range(count - 1):
        node = int(np.argmin(np.where(inside_N, np.inf, nearest_N)))
        tree.append((float(nearest_N[node]), int(from_N[node]), node))
        inside_N[node] = True
        closer_N = edge_NN[node] < nearest_N
        nearest_N = np.where(closer_N, edge_NN[node], nearest_N)
        from_N = np.where(closer_N, node, from_N)
    return sorted(tree)


def _root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _in_order(points_K2: Floats) -> Floats:
    kept_K2 = points_K2[points_K2[:, 1] > points_K2[:, 0]]
    return kept_K2[np.lexsort((kept_K2[:, 1], kept_K2[:, 0]))]
