"""Signatures and summaries: one length, blind to numbering and to scale, and telling shapes apart."""

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from bsns.core.ids import PeerId
from bsns.core.snapshot import NodeView, Snapshot
from bsns.topology.distance import distances
from bsns.topology.persistence import persistence
from bsns.topology.signature import signature, signature_distance
from bsns.topology.summary import summary
from bsns.topology.synthetic import KINDS, synthetic


def draw(kind, nodes, seed):
    return synthetic(kind, nodes, np.random.default_rng(seed))


def stretched(swarm, factor):
    """The same swarm with everything `factor` times as slow."""
    return replace(
        swarm,
        nodes=tuple(replace(node, block_time_s=node.block_time_s * factor) for node in swarm.nodes),
        links=MappingProxyType(
            {
                key: replace(link, round_trip_s=link.round_trip_s * factor, bytes_per_s=link.bytes_per_s / factor)
                for key, link in swarm.links.items()
            }
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 20])
def test_vectors_have_one_length(kind, nodes):
    vector = signature(draw(kind, nodes, 1)).vector
    assert vector.shape == (134,)
    assert np.isfinite(vector).all()


def test_a_swarm_twice_as_slow_has_the_same_diagrams():
    swarm = draw("uniform", 20, 2)
    one, other = signature(swarm), signature(stretched(swarm, 2.0))
    assert other.plain.h0 == pytest.approx(one.plain.h0)
    assert other.weighted.h0 == pytest.approx(one.weighted.h0)
    assert other.scale_s == pytest.approx(2 * one.scale_s)
    assert signature_distance(one, other) == pytest.approx(1, abs=1e-4)


def test_swarms_in_one_place_have_a_signature():
    nodes = tuple(NodeView(PeerId(f"n{number}"), 0.005, 10**9) for number in range(4))
    assert np.isfinite(signature(Snapshot(0.0, nodes)).vector).all()


def test_clustered_swarms_are_more_alike_than_clustered_and_scattered_ones():
    clustered = [signature(draw("lan_wan", 30, seed)) for seed in range(6)]
    scattered = [signature(draw("scale_free", 30, seed)) for seed in range(6)]
    within = np.mean([signature_distance(a, b) for a in clustered for b in clustered if a is not b])
    between = np.mean([signature_distance(a, b) for a in clustered for b in scattered])
    assert within < between


def test_a_summary_finds_the_clusters():
    swarm = draw("lan_wan", 24, 4)
    seen = distances(swarm)
    told = summary(seen, persistence(seen.matrix_MM), swarm)
    assert len(told.clusters) > 1
    assert sum(map(len, told.clusters)) == 24
    assert told.within_s < 1.5e-3 < 5e-3 < told.between_s
    assert (told.within_s, len(told.clusters)) in [(distance_s, groups) for distance_s, groups, _ in told.steps]
    for group in told.clusters:
        for peer in group:
            near = [other for other in group if other != peer]
            assert all(swarm.link(peer, other).round_trip_s <= 1e-3 for other in near)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_summaries_of_the_smallest_swarms(kind, nodes):
    swarm = draw(kind, nodes, 0)
    seen = distances(swarm)
    told = summary(seen, persistence(seen.matrix_MM), swarm)
    assert sum(map(len, told.clusters)) == nodes
    assert not told.loops
