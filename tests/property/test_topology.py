"""Topology: distances between diagrams are metrics, signatures are blind to numbering, hostile figures are refused."""

import math
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.errors import BadSnapshot
from bsns.core.ids import PeerId
from bsns.core.snapshot import Link, NodeView, Snapshot
from bsns.topology.diagrams import bottleneck, wasserstein
from bsns.topology.distance import distances
from bsns.topology.persistence import persistence
from bsns.topology.signature import signature, signature_distance

finite = st.floats(0, 10, allow_nan=False, width=32)
diagrams = st.lists(st.tuples(finite, finite), max_size=6).map(
    lambda pairs: np.array([(min(a, b), max(a, b)) for a, b in pairs], dtype=float).reshape(-1, 2)
)


@st.composite
def swarms(draw, most=8):
    count = draw(st.integers(1, most))
    nodes = tuple(
        NodeView(PeerId(f"n{number}"), draw(st.floats(1e-4, 1.0)), draw(st.integers(0, 10**10)))
        for number in range(count)
    )
    pairs = [(f"n{a}", f"n{b}") for a in range(count) for b in range(a + 1, count) if draw(st.integers(0, 4))]
    links = {(PeerId(a), PeerId(b)): Link(draw(st.floats(0, 1.0)), draw(st.floats(1e3, 1e10))) for a, b in pairs}
    return Snapshot(0.0, nodes, MappingProxyType(links))


@given(diagrams, diagrams, diagrams)
@settings(max_examples=50)
def test_distances_between_diagrams_are_metrics(one, other, third):
    for distance in (wasserstein, bottleneck):
        assert distance(one, one) == pytest.approx(0, abs=1e-9)
        assert distance(one, other) == pytest.approx(distance(other, one), abs=1e-9)
        assert distance(one, third) <= distance(one, other) + distance(other, third) + 1e-9
    assert bottleneck(one, other) <= wasserstein(one, other) + 1e-9
    # the order of points does not matter, nor do points on the diagonal
    more = np.vstack([one[::-1], [[3.0, 3.0]]])
    assert wasserstein(more, other) == pytest.approx(wasserstein(one, other), abs=1e-9)


@given(swarms(), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_signatures_do_not_depend_on_numbering(swarm, shuffler):
    order = list(range(len(swarm.nodes)))
    shuffler.shuffle(order)
    renamed = {swarm.nodes[old].peer: PeerId(f"m{new}") for new, old in enumerate(order)}
    nodes = [
        NodeView(renamed[node.peer], node.block_time_s, node.memory_bytes)
        for node in (swarm.nodes[number] for number in order)
    ]
    links = {}
    for (a, b), link in swarm.links.items():
        one, other = sorted((renamed[a], renamed[b]))
        links[one, other] = link
    other = Snapshot(0.0, tuple(nodes), MappingProxyType(links))
    assert signature(other).vector == pytest.approx(signature(swarm).vector, rel=1e-5, abs=1e-6)
    assert signature_distance(signature(swarm), signature(other)) == pytest.approx(0, abs=1e-4)


@given(swarms(), swarms(), swarms())
@settings(max_examples=25)
def test_signatures_lie_in_a_metric_space(first, second, last):
    one, other, third = (signature(swarm) for swarm in (first, second, last))
    assert signature_distance(one, other) == pytest.approx(signature_distance(other, one), rel=1e-9)
    assert signature_distance(one, third) <= signature_distance(one, other) + signature_distance(other, third) + 1e-6


@given(swarms())
@settings(max_examples=40)
def test_distances_are_symmetric_and_finite_and_points_live(swarm):
    seen = distances(swarm)
    assert (seen.matrix_MM == seen.matrix_MM.T).all()
    assert np.isfinite(seen.matrix_MM).all()
    assert (np.diag(seen.matrix_MM) == 0).all()
    found = persistence(seen.matrix_MM)
    assert np.isinf(found.h0[:, 1]).sum() == 1
    assert len(found.h0) <= len(swarm.nodes)
    assert (found.h1[:, 1] > found.h1[:, 0]).all()


@given(st.lists(st.lists(st.floats(), min_size=1, max_size=5), min_size=1, max_size=5))
@settings(max_examples=40)
def test_no_matrix_brings_it_down(rows):
    width = len(rows[0])
    matrix = np.array([(row * 5)[:width] for row in rows], dtype=float)
    if matrix.shape[0] == matrix.shape[1] and np.isfinite(matrix).all() and (matrix >= 0).all() and matrix.max() < 1e30:
        assert math.isinf(persistence(matrix).h0[-1, 1]) or len(matrix) > 1
    elif not (np.isfinite(matrix).all() and (matrix >= 0).all() and matrix.shape[0] == matrix.shape[1]):
        with pytest.raises(BadSnapshot):
            persistence(matrix)
