"""Synthetic swarms: of the shape asked for, feasible, the same for the same seed, and quick when large."""

import numpy as np
import pytest

from bsns.core.errors import BadOption
from bsns.core.snapshot import Snapshot
from bsns.topology.synthetic import KINDS, synthetic


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 9, 60])
def test_every_pair_is_measured(kind, nodes):
    swarm = synthetic(kind, nodes, np.random.default_rng(1))
    assert len(swarm.nodes) == nodes
    assert len(swarm.links) == nodes * (nodes - 1) // 2
    assert Snapshot.from_json(swarm.to_json()).links == swarm.links


@pytest.mark.parametrize("kind", KINDS)
def test_large_swarms_have_few_links_each(kind):
    swarm = synthetic(kind, 2000, np.random.default_rng(2))
    assert 12 <= 2 * len(swarm.links) / 2000 <= 18
    touched = {peer for pair in swarm.links for peer in pair}
    assert len(touched) == 2000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [1, 2, 5, 40])
def test_small_sparse_swarms(kind, nodes):
    swarm = synthetic(kind, nodes, np.random.default_rng(2), dense=False)
    assert all(one < other for one, other in swarm.links)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_swarm(kind):
    one, other, third = (synthetic(kind, 30, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one.to_json() == other.to_json() != third.to_json()


def test_lan_and_wan_have_their_figures():
    links = synthetic("lan_wan", 60, np.random.default_rng(3)).links.values()
    lan = [link for link in links if link.round_trip_s <= 1e-3]
    wan = [link for link in links if link.round_trip_s > 1e-3]
    assert lan
    assert wan
    assert all(1e9 / 8 <= link.bytes_per_s <= 1e10 / 8 and link.round_trip_s >= 1e-4 for link in lan)
    assert all(5e7 / 8 <= link.bytes_per_s <= 5e8 / 8 and 0.01 <= link.round_trip_s <= 0.08 for link in wan)


def test_ways_of_a_scale_free_swarm_obey_the_triangle():
    swarm = synthetic("scale_free", 30, np.random.default_rng(4))
    trip = np.zeros((30, 30))
    for (a, b), link in swarm.links.items():
        trip[int(a[1:]), int(b[1:])] = trip[int(b[1:]), int(a[1:])] = link.round_trip_s
    assert (trip <= (trip[:, :, None] + trip[None]).min(axis=1) + 1e-12).all()


def test_the_model_needs_about_a_third_of_the_nodes():
    for kind in KINDS:
        swarm = synthetic(kind, 24, np.random.default_rng(7), model_bytes=8e9)
        memory = np.array([node.memory_bytes for node in swarm.nodes])
        assert 4 <= 8e9 / memory.mean() <= 8
        times = np.array([node.block_time_s for node in swarm.nodes])
        assert times.min() > 1.5e-3
        assert times.max() < 16e-3
        assert times.max() > 3 * times.min()


@pytest.mark.parametrize(
    ("kind", "nodes", "size"), [("mesh", 3, 1e9), ("uniform", 0, 1e9), ("uniform", 3, float("nan"))]
)
def test_what_cannot_be_drawn(kind, nodes, size):
    with pytest.raises(BadOption):
        synthetic(kind, nodes, np.random.default_rng(0), model_bytes=size)
