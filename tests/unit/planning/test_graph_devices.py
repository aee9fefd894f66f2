"""Plans for unequal devices: costs by hand, the optimum by brute force, what is left out, what cannot fit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graphs import chain, every_partition, random_graph

from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.planning.graph import OperatorGraph, is_order, kahn, order_of_parts, quotient_is_acyclic
from bsns.planning.graph_devices import (
    Cutter,
    Devices,
    device_bound_s,
    device_costs,
    incoming_bytes,
    plan_devices,
)
from bsns.planning.orders import keys_of


def devices(speeds: list[float], rng: np.random.Generator | None = None, latency_s: float = 0.0) -> Devices:
    count = len(speeds)
    bandwidth = np.full((count, count), 10.0) if rng is None else rng.uniform(2, 20, (count, count))
    return Devices(np.array(speeds), bandwidth, np.full((count, count), latency_s))


def best_by_force(graph: OperatorGraph, of: Devices) -> float:
    """Every partition, in its one or more orders, on every choice of devices in every order."""
    best = math.inf
    for labels in every_partition(graph, of.count):
        parts = max(labels) + 1
        for order in itertools.permutations(range(parts)):
            place = [order.index(label) for label in labels]
            if any(place[u] > place[v] for u, v in graph.edges_E2.tolist()):
                continue
            for chosen in itertools.permutations(range(of.count), parts):
                best = min(best, max(device_costs(graph, [chosen[p] for p in place], chosen, of)))
    return best


def test_costs_by_hand() -> None:
    graph = chain([4.0, 2.0, 3.0], [10.0, 20.0, 0.0])
    of = devices([2.0, 1.0], latency_s=0.5)
    assert device_costs(graph, [0, 0, 1], [0, 1], of) == [3.0, 3 + 2 + 0.5]
    assert device_costs(graph, [1, 0, 0], [1, 0], of) == [4.0, 2.5 + 1 + 0.5]


def test_what_comes_in_comes_once() -> None:
    graph = OperatorGraph(tuple("pxyz"), np.ones(4), np.full(4, 10.0), np.array([(0, 1), (0, 2), (0, 3), (1, 3)]))
    coming = incoming_bytes(graph, np.array(kahn(graph, range(4))))
    assert coming[1, 4] == 10  # p, read three times
    assert coming[2, 4] == 20  # p and x
    assert coming[0, 4] == 0
    assert coming[3, 4] == 20


def test_over_all_orders_the_cut_is_the_optimum_and_plans_lie_between_it_and_kahn_and_slice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        graph = random_graph(rng, 5)
        of = devices(rng.uniform(0.5, 2, 3).tolist(), rng, 0.1)
        best_s = best_by_force(graph, of)
        orders = [order for order in itertools.permutations(range(5)) if is_order(graph, order)]
        keys = [
            np.concatenate([keys_of(np.array([order]))[0], np.array(ranks) / 3])
            for order in orders
            for ranks in itertools.permutations(range(3))
        ]
        assert min(Cutter(graph, of).cost(each) for each in keys) == pytest.approx(best_s)
        plan = plan_devices(graph, of, rng=rng, budget="brkga100")
        assert best_s * (1 - 1e-9) <= plan.bottleneck_s
        assert plan.bottleneck_s <= plan_devices(graph, of, rng=rng, budget="slice").bottleneck_s
        assert plan.bottleneck_s == pytest.approx(max(device_costs(graph, plan.device_of, plan.order, of)))
        assert plan.lower_bound_s <= best_s * (1 + 1e-9)
        assert quotient_is_acyclic(graph, plan.device_of)


def test_a_device_that_would_only_slow_down_is_left_out() -> None:
    graph = chain([1.0] * 6, [1.0] * 6)
    plan = plan_devices(graph, devices([1.0, 1.0, 1e-3], latency_s=0.1), rng=np.random.default_rng(0), budget="slice")
    assert 2 not in plan.order
    assert any("left out" in note for note in plan.assumptions)


def test_a_slow_link_is_avoided() -> None:
    of = devices([1.0, 1.0, 1.0])
    of.bytes_per_s_JJ[0, 2] = of.bytes_per_s_JJ[2, 0] = of.bytes_per_s_JJ[1, 2] = of.bytes_per_s_JJ[2, 1] = 1e-3
    plan = plan_devices(chain([1.0] * 4, [1.0] * 4), of, rng=np.random.default_rng(0), budget="brkga100")
    assert set(plan.order) == {0, 1}
    assert plan.bottleneck_s == pytest.approx(2.1)


def test_memory() -> None:
    graph = OperatorGraph(
        tuple("abcd"), np.ones(4), np.ones(4), np.array([(0, 1), (1, 2), (2, 3)]), np.full(4, 5.0), np.full(4, 1.0)
    )
    links = np.full((2, 2), 10.0)
    fits = Devices(np.ones(2), links, np.zeros((2, 2)), np.array([6.0, 16.0]))
    plan = plan_devices(graph, fits, rng=np.random.default_rng(0), budget="slice")
    assert sorted(plan.device_of.count(j) for j in range(2)) == [1, 3]
    small = Devices(np.ones(2), links, np.zeros((2, 2)), np.array([6.0, 6.0]))
    with pytest.raises(NotEnoughMemory):
        plan_devices(graph, small, rng=np.random.default_rng(0), budget="slice")
    spills = Devices(np.ones(2), links, np.zeros((2, 2)), np.array([6.0, 6.0]), np.array([5.0, 5.0]))
    assert plan_devices(graph, spills, rng=np.random.default_rng(0), budget="slice").bottleneck_s == pytest.approx(3.1)


def test_the_same_seed_plans_the_same_and_stops_when_told() -> None:
    rng = np.random.default_rng(1)
    graph, of = random_graph(rng, 12, 0.2), devices([1.0, 2.0, 0.5], rng)
    one, other = (plan_devices(graph, of, rng=np.random.default_rng(3), budget="brkga100") for _ in range(2))
    assert one == other
    stopped = plan_devices(graph, of, rng=np.random.default_rng(3), remaining_s=lambda: 0.0)
    assert any("stopped" in note for note in stopped.assumptions)
    assert stopped.bottleneck_s <= plan_devices(graph, of, rng=rng, budget="slice").bottleneck_s


def test_the_bound_counts_what_every_device_but_one_waits_for() -> None:
    graph = chain([1.0] * 10, [0.0] * 10)
    assert device_bound_s(graph, devices([1.0, 1.0])) == pytest.approx(5.0)
    assert device_bound_s(graph, devices([1.0, 1.0], latency_s=2.0)) == pytest.approx(6.0)
    assert device_bound_s(graph, devices([1.0, 1.0], latency_s=1e3)) == pytest.approx(10.0)


def test_numbering_of_parts() -> None:
    graph = chain([1.0] * 4, [1.0] * 4)
    assert order_of_parts(graph, [7, 7, 2, 2]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: devices([]),
        lambda: devices([1.0, 0.0]),
        lambda: devices([1.0, math.nan]),
        lambda: devices([1.0, 1.0], latency_s=-1.0),
        lambda: Devices(np.ones(2), np.zeros((2, 2)), np.zeros((2, 2))),
        lambda: Devices(np.ones(2), np.ones((2, 2)), np.zeros((3, 3))),
        lambda: Devices(np.ones(2), np.ones((2, 2)), np.zeros((2, 2)), np.array([-1.0, 1.0])),
        lambda: plan_devices(chain([1.0], [1.0]), devices([1.0]), rng=np.random.default_rng(0), budget="much"),
    ],
)
def test_impossible_figures_are_refused(wrong) -> None:
    with pytest.raises(BadOption):
        wrong()
