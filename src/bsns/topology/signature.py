"""Signatures: a swarm's shape as persistence diagrams and a vector of fixed length, to tell which swarms are alike.

They do not depend on how nodes are numbered. Diagrams are in units of the swarm's `scale_s`, so that a swarm twice as
far-flung has the same ones; how far two scales lie apart is counted on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bsns.core.snapshot import Snapshot
from bsns.topology.diagrams import wasserstein
from bsns.topology.distance import REFERENCE_BYTES, Distances, Floats, distances
from bsns.topology.persistence import Diagrams, node_entries, persistence

QUANTILES = np.linspace(0.0, 1.0, 17)
"""At which the sorted persistences of a diagram enter the vector."""
RADII = np.linspace(0.0, 2.0, 17)[1:]
"""In units of the scale; at which Betti numbers enter the vector."""
LEAST_SCALE_S = 1e-6
"""Of a swarm whose nodes all stand in one place."""


@dataclass(frozen=True, slots=True)
class Signature:
    """`plain` are the diagrams of the distances alone, `weighted` those in which slow and small nodes enter late.

    `scale_s` is the median distance between two nodes; of a single node its block time.
    """

    node_count: int
    scale_s: float
    plain: Diagrams
    weighted: Diagrams

    @property
    def vector(self) -> Floats:
        """(134,) numbers: sorted persistences at 17 quantiles and Betti numbers per node at 16 radii, scale, size."""
        parts = [_features(diagrams, self.node_count) for diagrams in (self.plain, self.weighted)]
        return np.concatenate([*parts, [math.log2(self.scale_s), math.log2(self.node_count)]])


def signature(snapshot: Snapshot, *, size_bytes: float = REFERENCE_BYTES) -> Signature:
    """The signature of a swarm; of a large one that of a well spread sample. Raises BadSnapshot."""
    return signature_of(distances(snapshot, size_bytes=size_bytes), snapshot)


def signature_of(seen: Distances, snapshot: Snapshot) -> Signature:
    """The same from distances that are known already."""
    entry_M = node_entries([snapshot.nodes[number] for number in seen.index_M])
    apart = seen.matrix_MM[np.triu_indices(len(entry_M), 1)]
    scale_s = max(float(np.median(apart)) if len(apart) else float(entry_M[0]), LEAST_SCALE_S)
    return Signature(
        len(entry_M),
        scale_s,
        persistence(seen.matrix_MM / scale_s),
        persistence(seen.matrix_MM / scale_s, entry_M / scale_s),
    )


def signature_distance(one: Signature, other: Signature) -> float:
    """How unlike two swarms are: the diagrams' Wasserstein distances per node, and how often scale and size double.

    0 for a swarm and itself, the same in both directions, and never more over a third swarm.
    """
    total = math.hypot(math.log2(one.scale_s / other.scale_s), math.log2(one.node_count / other.node_count))
    for mine, others in ((one.plain, other.plain), (one.weighted, other.weighted)):
        for left_K2, right_K2 in ((mine.h0, others.h0), (mine.h1, others.h1)):
            total += _measure_distance(left_K2, right_K2, one.node_count, other.node_count)
    return total


def _measure_distance(one_K2: Floats, other_K2: Floats, nodes: int, other_nodes: int) -> float:
    """Between diagrams in which each node's share is one: points shrink with the number of nodes that made them."""
    return wasserstein(one_K2 / nodes, other_K2 / other_nodes)


def _features(diagrams: Diagrams, node_count: int) -> Floats:
    parts = []
    for points_K2 in (diagrams.h0, diagrams.h1):
        lives_K = np.diff(points_K2[np.isfinite(points_K2[:, 1])])[:, 0]
        parts.append(np.quantile(lives_K, QUANTILES) if len(lives_K) else np.zeros(len(QUANTILES)))
        alive_RK = (points_K2[:, 0] <= RADII[:, None]) & (RADII[:, None] < points_K2[:, 1])
        parts.append(alive_RK.sum(axis=1) / node_count)
    return np.concatenate(parts)
