"""How far two persistence diagrams lie apart: the exact Wasserstein and bottleneck distances.

Points (K, 2) are births and deaths. A point may be matched to one of the other diagram or to the diagonal; points with
infinite death only to each other, in the order of their births (Edelsbrunner & Harer, Computational Topology, 2010).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from bsns.core.errors import BadSnapshot
from bsns.topology.distance import Floats


def wasserstein(one_K2: Floats, other_K2: Floats, p: float = 1.0) -> float:
    """(Σ lengthᵖ)^(1/p) over the matching for which that is least, lengths Euclidean; inf for unequal infinities."""
    if not 1 <= p < np.inf:
        raise BadSnapshot(f"there is no Wasserstein distance of order {p}")
    one_K2, births_A = _split(one_K2)
    other_K2, births_B = _split(other_K2)
    if len(births_A) != len(births_B):
        return float(np.inf)
    apart_KK = np.hypot(*(one_K2[:, None] - other_K2[None]).transpose(2, 0, 1)) ** p
    to_diagonal_K = (np.diff(one_K2)[:, 0] / np.sqrt(2)) ** p
    other_to_diagonal_K = (np.diff(other_K2)[:, 0] / np.sqrt(2)) ** p
    # Matching two points pays off by what their ways to the diagonal would have cost. Never worse than not at all.
    gain_KK = np.maximum(to_diagonal_K[:, None] + other_to_diagonal_K[None, :] - apart_KK, 0.0)
    row, column = linear_sum_assignment(gain_KK, maximize=True)
    total = to_diagonal_K.sum() + other_to_diagonal_K.sum() - gain_KK[row, column].sum()
    total += float((np.abs(births_A - births_B) ** p).sum())
    return float(max(total, 0.0) ** (1 / p))


def bottleneck(one_K2: Floats, other_K2: Floats) -> float:
    """The longest of a matching's lengths for the matching where that is least, lengths in the maximum norm."""
    one_K2, births_A = _split(one_K2)
    other_K2, births_B = _split(other_K2)
    if len(births_A) != len(births_B):
        return float(np.inf)
    least = float(np.abs(births_A - births_B).max(initial=0.0))
    count, others = len(one_K2), len(other_K2)
    if not count + others:
        return least
    cost = np.zeros((count + others, count + others))
    cost[:count, :others] = np.abs(one_K2[:, None] - other_K2[None]).max(axis=2)
    cost[:count, others:] = (np.diff(one_K2) / 2).repeat(count, axis=1)
    cost[count:, :others] = (np.diff(other_K2) / 2).repeat(others, axis=1).T
    steps = np.unique(np.maximum(cost, least))
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        matched = maximum_bipartite_matching(csr_array(cost <= steps[middle]), perm_type="column")
        low, high = (low, middle) if (matched >= 0).all() else (middle + 1, high)
    return float(steps[low])


def _split(points_K2: Floats) -> tuple[Floats, Floats]:
    """Its finite points, and the births of the others, in order. Raises BadSnapshot."""
    points_K2 = np.asarray(points_K2, dtype=np.float64)
    if points_K2.size == 0:
        return np.zeros((0, 2)), np.zeros(0)
    if points_K2.ndim != 2 or points_K2.shape[1] != 2:
        raise BadSnapshot(f"points of shape {points_K2.shape} are no persistence diagram")
    births_K, deaths_K = points_K2.T
    if not np.isfinite(births_K).all() or not (deaths_K >= births_K).all():
        raise BadSnapshot("a diagram's points are born at finite values and do not die before")
    finite_K = np.isfinite(deaths_K)
    return points_K2[finite_K], np.sort(births_K[~finite_K])
