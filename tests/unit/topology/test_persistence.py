"""Persistence against hand-made swarms, against ripser itself, and on the smallest swarms there are."""

import math

import numpy as np
import pytest
from ripser import ripser

from bsns.core.errors import BadSnapshot
from bsns.core.ids import PeerId
from bsns.core.snapshot import NodeView
from bsns.topology.distance import distances
from bsns.topology.persistence import clusters, merges, node_entries, persistence
from bsns.topology.synthetic import KINDS, synthetic


def square():
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    return apart


def test_a_ring_of_four_is_one_loop():
    found = persistence(square())
    assert found.h0.tolist() == [[0, 1], [0, 1], [0, 1], [0, math.inf]]
    assert found.h1 == pytest.approx(np.array([[1, math.sqrt(2)]]))


def test_an_asymmetric_matrix_is_made_symmetric_before_ripser_sees_it():
    skewed = square()
    skewed[0, 2] = 0.1  # one direction of a diagonal; ripser alone would read one triangle and close the ring
    assert persistence(skewed).h1 == pytest.approx(persistence(square()).h1)
    assert persistence(skewed.T).h1 == pytest.approx(persistence(square()).h1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_smallest_swarms(count):
    found = persistence(np.ones((count, count)) - np.eye(count))
    assert found.h0.tolist() == [[0, 1]] * (count - 1) + [[0, math.inf]]
    assert found.h1.shape == (0, 2)


def test_nodes_in_one_place():
    assert persistence(np.zeros((5, 5))).h0.tolist() == [[0, math.inf]]


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_equal_those_of_ripser(kind):
    matrix = distances(synthetic(kind, 50, np.random.default_rng(1))).matrix_MM
    h0, h1 = ripser(matrix, maxdim=1, distance_matrix=True)["dgms"]
    found = persistence(matrix)
    assert found.h0[:, 1] == pytest.approx(np.sort(h0[:, 1]), rel=1e-6)
    assert len(found.h1) == len(h1)


def test_the_elder_rule():
    # 0 – 1 – 2 in a row; 1 enters late, 2 latest.
    matrix = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]], dtype=float)
    found = persistence(matrix, np.array([0.5, 0.8, 3.0]))
    assert found.h0.tolist() == [[0.5, math.inf], [0.8, 1], [3, 4]]
    assert [(merge.stays, merge.joins) for merge in merges(matrix, np.array([0.5, 0.8, 3.0]))] == [(0, 1), (0, 2)]


def test_a_node_that_enters_after_its_way_never_is_a_cluster_of_its_own():
    matrix = np.array([[0, 1], [1, 0]], dtype=float)
    assert persistence(matrix, np.array([0.0, 5.0])).h0.tolist() == [[0, math.inf]]


def test_a_late_node_opens_its_loop_late():
    found = persistence(square(), np.array([0, 0, 0, 1.2]))
    assert found.h1 == pytest.approx(np.array([[1.2, math.sqrt(2)]]))
    assert persistence(square(), np.array([0, 0, 0, 1.5])).h1.shape == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_clusters_equal_ripsers_with_births_on_the_diagonal(kind):
    swarm = synthetic(kind, 30, np.random.default_rng(3))
    matrix, entries = distances(swarm).matrix_MM, node_entries(swarm.nodes)
    born = np.maximum(matrix, np.maximum(entries[:, None], entries[None, :]))
    np.fill_diagonal(born, entries)
    h0, h1 = ripser(born, maxdim=1, distance_matrix=True)["dgms"]
    found = persistence(matrix, entries)
    kept = h0[h0[:, 1] > h0[:, 0] * (1 + 1e-6)]
    assert found.h0[np.lexsort(found.h0.T)] == pytest.approx(kept[np.lexsort(kept.T)], rel=1e-5)
    assert len(found.h1) == len(h1)


def test_entries_grow_with_block_time_and_shrink_with_memory():
    nodes = [
        NodeView(PeerId(f"n{n}"), time, memory) for n, (time, memory) in enumerate([(1, 8), (2, 8), (1, 4), (1, 0)])
    ]
    assert node_entries(nodes) == pytest.approx([0.75, 1.5, 1.5, 100.0])
    assert node_entries([NodeView(PeerId("n"), 2.0, 0)]).tolist() == [2.0]


def test_clusters_at_a_distance():
    matrix = np.array([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 2], [9, 9, 2, 0]], dtype=float)
    assert clusters(matrix, 0.5) == [[0], [1], [2], [3]]
    assert clusters(matrix, 1) == [[0, 1], [2], [3]]
    assert clusters(matrix, 2) == [[0, 1], [2, 3]]
    assert clusters(matrix, 9) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("entries", [[0.0], [0.0, math.nan], [0.0, -1.0], [0.0, math.inf]])
def test_impossible_entries(entries):
    with pytest.raises(BadSnapshot):
        persistence(np.array([[0, 1], [1, 0]], dtype=float), np.array(entries))


def test_no_nodes():
    with pytest.raises(BadSnapshot):
        persistence(np.zeros((0, 0)))
