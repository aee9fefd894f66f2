"""Lower bounds and proofs: each argument below the optimum by brute force, the exact ones at it, and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graphs import best_of_all, chain, random_graph

from bsns.bench.graph_suite import KINDS
from bsns.planning.graph import Fleet, OperatorGraph, is_order, part_costs, quotient_is_acyclic
from bsns.planning.graph_bounds import PRECISION, Bound, Bounds
from bsns.planning.min_cuts import PrefixCuts, ancestors, seeded_cuts
from bsns.planning.partition_model import solve
from bsns.planning.prefixes import all_prefixes
from bsns.planning.slicing import best_slice


def goes_on() -> bool:
    return False


def test_by_hand() -> None:
    graph = chain([3.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 0.0])
    bounds = Bounds(graph)
    assert bounds.quick(Fleet(3, 1.0)).reason == "heaviest"
    assert bounds.quick(Fleet(3, 1.0)).value_s == pytest.approx(3.0)
    assert bounds.quick(Fleet(2, 1.0)) == Bound(3.0, "counted")
    assert bounds.quick(Fleet(1, 1.0)) == Bound(6.0, "counted")
    crowded = chain([4.0, 4.0, 4.0], [0.0, 0.0, 0.0])
    assert Bounds(crowded).quick(Fleet(2, 1.0)) == Bound(8.0, "crowded")


def test_the_heaviest_operator_takes_what_is_cheaper_to_hold_than_to_send() -> None:
    """b with a or c beside it saves the large tensor between them."""
    graph = chain([1.0, 10.0, 1.0, 10.0], [9.0, 9.0, 1.0, 0.0])
    assert Bounds(graph).quick(Fleet(2, 1.0)).value_s == pytest.approx(13.0)  # a, b, c: 12 and 1 out
    assert best_of_all(graph, Fleet(2, 1.0)) == pytest.approx(13.0)


def test_memory_that_nobody_has_is_paid_by_all() -> None:
    graph = OperatorGraph(tuple("ab"), np.ones(2), np.zeros(2), np.zeros((0, 2)), np.array([6.0, 6.0]))
    assert Bounds(graph).quick(Fleet(2, 1.0, 4.0)).value_s == pytest.approx(3.0)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_seeded_cuts_equal_brute_force(slope: float) -> None:
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 7)
    io = graph.sent_V / 3
    found = seeded_cuts(graph, io, slope, range(7))
    for seed in range(7):
        sets = [set(s) | {seed} for size in range(7) for s in itertools.combinations(range(7), size)]
        costs = []
        for held in sets:
            out = sum(io[v] for v in held if any(c not in held for c in graph.consumers[v]))
            into = sum(io[v] for v in range(7) if v not in held and any(c in held for c in graph.consumers[v]))
            costs.append(out + into + slope * sum(graph.work_V[v] for v in held))
        assert found[seed] == pytest.approx(min(costs), abs=1e-9)


def test_prefix_cuts_equal_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        graph = random_graph(rng, 8, 0.35)
        io = graph.sent_V
        reach = ancestors(graph)
        first, last = rng.choice(8, size=2, replace=False)
        inside, outside = reach[first].astype(bool), reach[:, last].astype(bool)
        if (inside & outside).any():
            continue
        payers = np.flatnonzero((io > 0) & ~outside)
        some = rng.random(len(payers)) < 0.5
        holds = all_prefixes(graph)
        assert holds is not None
        fitting = holds[holds[:, inside].all(axis=1) & ~holds[:, outside].any(axis=1)]
        cuts = PrefixCuts(graph, io, inside, outside, payers)
        for paying, which in ((None, payers), (some, payers[some])):
            costs = [
                sum(io[v] for v in which if held[v] and not held[list(graph.consumers[v])].all()) for held in fitting
            ]
            assert cuts.least(paying) == pytest.approx(min(costs), abs=1e-9)


def test_all_prefixes_are_those_of_all_orders() -> None:
    graph = random_graph(np.random.default_rng(2), 6)
    prefixes = {
        frozenset(order[:length])
        for order in itertools.permutations(range(6))
        if is_order(graph, order)
        for length in range(7)
    }
    holds = all_prefixes(graph)
    assert holds is not None
    assert {frozenset(np.flatnonzero(row).tolist()) for row in holds} == prefixes
    assert len(holds) == len(prefixes)
    assert all_prefixes(graph, len(prefixes) - 1) is None


@pytest.mark.parametrize("memory", [math.inf, 3.0])
def test_no_argument_exceeds_the_optimum_and_the_exact_one_meets_it(memory: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        graph = random_graph(rng, int(rng.integers(2, 7)))
        fleet = Fleet(int(rng.integers(2, 4)), float(rng.choice([1.0, 10.0])), memory)
        best_s = best_of_all(graph, fleet)
        bounds = Bounds(graph)
        quick_s = bounds.quick(fleet).value_s
        assert quick_s <= best_s * (1 + 1e-9)
        for argue in (bounds._seeded, bounds._windows, bounds._exact, bounds._model):
            bound = argue(fleet, quick_s, best_s * 1.3, goes_on)
            assert bound.value_s <= best_s * (1 + 1e-6), bound.reason
            if bound.part_of is not None:
                assert part_costs(graph, bound.part_of, fleet).max() >= best_s * (1 - 1e-9)
                assert quotient_is_acyclic(graph, bound.part_of)
                assert max(bound.part_of) < fleet.machines
        exact = bounds._exact(fleet, quick_s, best_s * 1.3, goes_on)
        assert max(exact.value_s, quick_s) >= best_s * (1 - 2 * PRECISION * 1.3)
        # whoever already has the optimum is told so
        assert bounds.lower(fleet, best_s).value_s == pytest.approx(best_s, rel=2 * PRECISION)


def test_windows_hold_every_optimum() -> None:
    rng = np.random.default_rng(4)
    for _ in range(12):
        graph = random_graph(rng, 6)
        fleet = Fleet(3, 3.0)
        bounds = Bounds(graph)
        best_s = best_of_all(graph, fleet)
        bounds._seeded(fleet, 0.5 * best_s, best_s, goes_on)
        windows = bounds.windows(fleet, best_s)
        assert not windows.empty
        exact = bounds._exact(fleet, 0.5 * best_s, best_s * 1.01, goes_on)
        if exact.part_of is not None:
            part = np.array(exact.part_of) + 1
            wide = bounds.windows(fleet, float(part_costs(graph, exact.part_of, fleet).max()))
            assert (part >= wide.early_V).all()
            assert (part <= wide.late_V).all()


def test_the_integer_program_finds_the_optimum() -> None:
    rng = np.random.default_rng(5)
    for _ in range(4):
        graph = random_graph(rng, 6)
        fleet = Fleet(3, 3.0)
        best_s = best_of_all(graph, fleet)
        anywhere = np.ones(6, dtype=np.intp), np.full(6, 3)
        solved = solve(graph, fleet, float(graph.work_V.sum()), *anywhere)
        assert solved.optimal
        assert solved.part_of is not None
        assert part_costs(graph, solved.part_of, fleet).max() == pytest.approx(best_s, rel=1e-4)
        assert best_s * (1 - 1e-4) <= solved.lower_s <= best_s * (1 + 1e-9)


def test_a_chain_is_solved_and_a_wide_graph_is_bounded_beyond_its_work() -> None:
    case = KINDS["unet"](100, np.random.default_rng(6))
    fleet = Fleet(6, case.bytes_per_s)
    cost_s, _ = best_slice(case.graph, np.arange(case.graph.count), fleet)
    bound = Bounds(case.graph).lower(fleet, cost_s * 1.05)
    assert bound.value_s == pytest.approx(cost_s, rel=3e-4)
    assert bound.part_of is not None
    wide = KINDS["layered"](120, np.random.default_rng(7))
    fleet = Fleet(6, wide.bytes_per_s)
    counted_s = float(wide.graph.work_V.sum()) / 6
    bounds = Bounds(wide.graph)
    assert bounds._seeded(fleet, counted_s, counted_s * 1.1, goes_on).value_s > counted_s * 1.004
    assert bounds._windows(fleet, counted_s, counted_s * 1.1, goes_on).value_s > counted_s * 1.004


def test_a_better_partition_is_handed_on_even_where_its_bound_was_known() -> None:
    graph = OperatorGraph(tuple("abc"), np.array([0.1, 1.0, 0.1]), np.zeros(3), np.zeros((0, 2)))
    bound = Bounds(graph).lower(Fleet(2, 1.0), 1.1)
    assert bound.value_s == pytest.approx(1.0)
    assert bound.part_of is not None
    assert part_costs(graph, bound.part_of, Fleet(2, 1.0)).max() == 1.0


def test_it_stops_when_told() -> None:
    case = KINDS["branching"](60, np.random.default_rng(8))
    fleet = Fleet(6, case.bytes_per_s)
    bounds = Bounds(case.graph)
    assert bounds.lower(fleet, 1.0, lambda: True) == bounds.quick(fleet)
