"""Costs of pieces and the best cut of an order, against their definitions, the plain recurrence and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graphs import chain, plain_slice, random_graph

from bsns.planning import slicing
from bsns.planning.graph import Fleet, kahn_orders, part_costs, quotient_is_acyclic
from bsns.planning.segments import Segments, segment_costs
from bsns.planning.slicing import best_slice, slice_orders


def fleets(machines: int) -> list[Fleet]:
    return [Fleet(machines, 2.0), Fleet(machines, 2.0, 6.0), Fleet(machines, 2.0, 9.0, hard_memory=True)]


def test_costs_by_hand() -> None:
    graph = chain([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    cost = segment_costs(graph, np.arange(3), Fleet(2, 10.0))
    assert cost[0, 0] == 1 + 1  # a's output leaves
    assert cost[1, 1] == 1 + 2 + 2  # in from a, out to c
    assert cost[2, 2] == 2 + 3  # nobody reads c
    assert cost[0, 1] == 1 + 2 + 2
    assert cost[0, 2] == 6
    assert np.isinf(cost[1, 0])


def test_a_tensor_comes_in_once_and_goes_out_once() -> None:
    """One producer, three readers."""
    from bsns.planning.graph import OperatorGraph

    graph = OperatorGraph(tuple("pxyz"), np.ones(4), np.full(4, 10.0), np.array([(0, 1), (0, 2), (0, 3)]))
    cost = segment_costs(graph, np.arange(4), Fleet(2, 10.0))
    assert cost[0, 0] == 1 + 1
    assert cost[1, 2] == 2 + 1
    assert cost[0, 2] == 3 + 1
    assert part_costs(graph, [0, 1, 1, 2], Fleet(3, 10.0)).tolist() == [2, 3, 2]


def test_every_piece_costs_what_it_costs_as_a_part() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 2, 5, 9):
        for fleet in fleets(3):
            graph = random_graph(rng, count)
            order = kahn_orders(graph, rng.random((1, count)))[0]
            cost = segment_costs(graph, order, fleet)
            for left, right in itertools.combinations_with_replacement(range(count), 2):
                part = np.ones(count, dtype=np.intp)
                part[order[:left]], part[order[right + 1 :]] = 0, 2
                assert cost[left, right] == pytest.approx(part_costs(graph, part, fleet)[1])


def test_a_block_holds_what_the_band_holds() -> None:
    rng = np.random.default_rng(2)
    graph = random_graph(rng, 30, 0.1)
    orders = kahn_orders(graph, rng.random((4, 30)))
    pieces = Segments(graph, orders, Fleet(3, 2.0))
    block = pieces.block(range(5, 17), range(11, 31))
    for p in range(4):
        cost = segment_costs(graph, orders[p], Fleet(3, 2.0))
        for left, end in itertools.product(range(5, 17), range(11, 31)):
            assert block[p, left - 5, end - 11] == pytest.approx(cost[left, end - 1] if left < end else math.inf)


@pytest.mark.parametrize("way", ["_by_band", "_by_blocks"])
def test_both_ways_of_slicing_equal_the_plain_recurrence(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a count that shows which way was taken."""
    taken: list[str] = []
    for name in ("_by_band", "_by_blocks"):
        original = getattr(slicing, name)
        monkeypatch.setattr(slicing, name, lambda *a, _n=name, _f=original: (taken.append(_n), _f(*a))[1])
    rng = np.random.default_rng(3)
    cases = [(400, 3)] if way == "_by_blocks" else [(40, 12), (25, 2), (60, 5)]
    for count, machines in cases:
        graph = random_graph(rng, count, 2 / count)
        orders = kahn_orders(graph, np.stack([graph.depth_V + rng.random(count) for _ in range(3)]))
        fleet = Fleet(machines, 20.0)
        found = slice_orders(graph, orders, fleet)
        for order, cost_s in zip(orders, found, strict=True):
            assert cost_s == pytest.approx(plain_slice(segment_costs(graph, order, fleet), machines))
    assert way in taken


def test_a_limit_changes_nothing_that_stays_below_it() -> None:
    rng = np.random.default_rng(4)
    graph = random_graph(rng, 60, 0.05)
    orders = kahn_orders(graph, rng.random((20, 60)))
    for fleet in fleets(7)[:2]:
        free = slice_orders(graph, orders, fleet)
        limit_s = float(np.median(free))
        limited = slice_orders(graph, orders, fleet, limit_s)
        assert limited[free <= limit_s] == pytest.approx(free[free <= limit_s])
        assert np.isinf(limited[free > limit_s * 1.001]).all()


def test_the_cut_costs_what_it_promises() -> None:
    rng = np.random.default_rng(5)
    for fleet in fleets(4):
        graph = random_graph(rng, 40, 0.05)
        cost_s, part = best_slice(graph, kahn_orders(graph, rng.random((1, 40)))[0], fleet)
        if math.isfinite(cost_s):
            assert part_costs(graph, part, fleet).max() == pytest.approx(cost_s)
            assert quotient_is_acyclic(graph, part)
            assert part.max() < 4


def test_what_cannot_fit_costs_infinitely_much() -> None:
    graph = random_graph(np.random.default_rng(6), 8)
    cost_s, _ = best_slice(graph, kahn_orders(graph, np.zeros((1, 8)))[0], Fleet(3, 1.0, 0.0, hard_memory=True))
    assert math.isinf(cost_s)


def test_one_machine_takes_everything() -> None:
    graph = random_graph(np.random.default_rng(7), 12)
    cost_s, part = best_slice(graph, kahn_orders(graph, np.zeros((1, 12)))[0], Fleet(1, 1.0))
    assert cost_s == pytest.approx(graph.work_V.sum())
    assert not part.any()
