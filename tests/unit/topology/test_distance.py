"""Distances: symmetric whatever is given, assumptions said, impossible figures refused, samples that cover."""

import math
from types import MappingProxyType

import numpy as np
import pytest

from bsns.core.errors import BadSnapshot
from bsns.core.ids import PeerId
from bsns.core.snapshot import ASSUMED_LINK, Link, NodeView, Snapshot
from bsns.topology.distance import distances, symmetric
from bsns.topology.synthetic import synthetic


def swarm(count, links):
    nodes = tuple(NodeView(PeerId(f"n{number}"), 0.005, 10**9) for number in range(count))
    return Snapshot(0.0, nodes, MappingProxyType({(PeerId(a), PeerId(b)): link for (a, b), link in links.items()}))


def test_delay_and_bandwidth():
    seen = distances(swarm(2, {("n0", "n1"): Link(0.02, 1e6)}), size_bytes=1000)
    assert seen.matrix_MM == pytest.approx(np.array([[0, 0.011], [0.011, 0]]))
    assert seen.assumptions == ()


def test_a_missing_link_is_the_shortest_way_and_a_measured_one_is_not_replaced():
    links = {("n0", "n1"): Link(0.02), ("n1", "n2"): Link(0.04), ("n2", "n3"): Link(0.02), ("n0", "n2"): Link(0.2)}
    seen = distances(swarm(4, links))
    assert seen.matrix_MM[0, 2] == pytest.approx(0.1)
    assert seen.matrix_MM[0, 3] == pytest.approx(0.04)
    assert "2 of 6 links were not measured" in seen.assumptions[0]


def test_two_directions_that_differ_count_as_the_slower():
    seen = distances(swarm(2, {("n0", "n1"): Link(0.02, 1e6), ("n1", "n0"): Link(0.04, 2e6)}), size_bytes=1000)
    assert seen.matrix_MM[0, 1] == seen.matrix_MM[1, 0] == pytest.approx(0.021)
    assert "differ" in seen.assumptions[0]


def test_parts_that_no_way_joins():
    seen = distances(swarm(4, {("n0", "n1"): Link(0.02), ("n2", "n3"): Link(0.04)}))
    assert seen.matrix_MM[0, 2] == seen.matrix_MM.max() == pytest.approx(0.02)
    assert any("no measured way" in note for note in seen.assumptions)


def test_nothing_measured_at_all():
    seen = distances(swarm(3, {}))
    assert seen.matrix_MM[0, 1] == ASSUMED_LINK.transfer_s(8192)
    assert seen.assumptions == (
        "no link was measured; the nodes are assumed to be joined by ways with a round trip of 20 ms and 12.5 MB/s",
    )
    assert distances(swarm(1, {})).matrix_MM.tolist() == [[0.0]]
    assert distances(swarm(1, {})).assumptions == ()


def test_links_of_no_length_are_links():
    seen = distances(swarm(3, {("n0", "n1"): Link(0.0), ("n1", "n2"): Link(0.02), ("n0", "n2"): Link(0.02)}))
    assert seen.assumptions == ()
    assert seen.matrix_MM[0, 1] < 1e-8


@pytest.mark.parametrize("link", [Link(math.nan), Link(-1.0), Link(math.inf), Link(0.01, 0.0), Link(0.01, math.nan)])
def test_impossible_links(link):
    with pytest.raises(BadSnapshot):
        distances(swarm(2, {("n0", "n1"): link}))


def test_impossible_swarms():
    with pytest.raises(BadSnapshot, match="no nodes"):
        distances(Snapshot(0.0, ()))
    with pytest.raises(BadSnapshot, match="block_time_s"):
        distances(Snapshot(0.0, (NodeView(PeerId("n0"), math.nan, 1),)))
    node = NodeView(PeerId("n0"), 0.005, 1)
    with pytest.raises(BadSnapshot, match="same peer id"):
        distances(Snapshot(0.0, (node, node)))
    with pytest.raises(BadSnapshot):
        distances(swarm(2, {}), size_bytes=math.nan)


@pytest.mark.parametrize("matrix", [[[0.0, math.nan], [1.0, 0.0]], [[0.0, -1.0], [1.0, 0.0]], [[0.0, 1.0]], []])
def test_impossible_matrices(matrix):
    with pytest.raises(BadSnapshot):
        symmetric(np.array(matrix, dtype=float))


def test_the_larger_direction_counts():
    assert symmetric(np.array([[0.5, 1.0], [2.0, 0.0]])).tolist() == [[0.0, 2.0], [2.0, 0.0]]


@pytest.mark.parametrize("dense", [True, False])
def test_a_large_swarm_is_sampled_by_farthest_points(dense):
    large = synthetic("uniform", 150, np.random.default_rng(1), dense=dense)
    whole, seen = distances(large), distances(large, most=40)
    assert len(seen.index_M) == len(set(seen.index_M.tolist())) == 40
    assert seen.node_count == 150
    assert "40 that lie well spread" in " ".join(seen.assumptions)
    assert seen.matrix_MM == pytest.approx(whole.matrix_MM[np.ix_(seen.index_M, seen.index_M)])
    others = np.setdiff1d(np.arange(150), seen.index_M)
    assert whole.matrix_MM[np.ix_(others, seen.index_M)].min(axis=1).max() == pytest.approx(seen.radius_s)
    # a packing as well as a cover: that is what makes the greedy choice a 2-approximation
    apart = seen.matrix_MM[~np.eye(40, dtype=bool)]
    assert apart.min() >= seen.radius_s
