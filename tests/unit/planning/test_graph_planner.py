"""Graph plans: never worse than Kahn + slice, the same from the same seed, stopped in time, and honest about it."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import best_of_all, chain, random_graph

from bsns.bench.graph_suite import KINDS
from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.planning import graph_planner
from bsns.planning.graph import Fleet, OperatorGraph, is_order, kahn_orders, part_costs, quotient_is_acyclic
from bsns.planning.graph_planner import BUDGETS, Budget, plan_graph
from bsns.planning.orders import keys_of, lined_up, natural_orders
from bsns.planning.refining import _Loads, refine
from bsns.planning.slicing import best_slice


@pytest.mark.parametrize("kind", KINDS)
def test_budgets_only_ever_help(kind: str) -> None:
    case = KINDS[kind](60, np.random.default_rng(0))
    fleet = Fleet(6, case.bytes_per_s)
    best_s = min(best_slice(case.graph, order, fleet)[0] for order in natural_orders(case.graph).values())
    sliced, searched = (
        plan_graph(case.graph, fleet, rng=np.random.default_rng(1), budget=budget, prove=False)
        for budget in ("slice", "brkga100")
    )
    assert sliced.bottleneck_s == pytest.approx(best_s)
    assert searched.bottleneck_s <= sliced.bottleneck_s
    for plan in (sliced, searched):
        assert plan.bottleneck_s == pytest.approx(part_costs(case.graph, plan.part_of, fleet).max())
        assert plan.lower_bound_s <= plan.bottleneck_s
        assert plan.gap == pytest.approx(plan.bottleneck_s / plan.lower_bound_s - 1)
        assert quotient_is_acyclic(case.graph, plan.part_of)
        assert plan.parts == max(plan.part_of) + 1 <= 6
        assert all(plan.part_of[u] <= plan.part_of[v] for u, v in case.graph.edges_E2.tolist())


def test_small_graphs_are_solved() -> None:
    rng = np.random.default_rng(1)
    for _ in range(8):
        graph = random_graph(rng, 6)
        fleet = Fleet(3, 3.0)
        plan = plan_graph(graph, fleet, rng=rng, budget="slice")
        assert plan.bottleneck_s == pytest.approx(best_of_all(graph, fleet), rel=2e-4)
        assert plan.gap <= 2e-4


def test_the_same_seed_plans_the_same() -> None:
    case = KINDS["layered"](60, np.random.default_rng(2))
    one, other = (
        plan_graph(case.graph, Fleet(5, case.bytes_per_s), rng=np.random.default_rng(3), budget="brkga100", prove=False)
        for _ in range(2)
    )
    assert one == other


def test_more_machines_than_operators() -> None:
    graph = chain([3.0, 3.0, 3.0], [0.0, 0.0, 0.0])
    plan = plan_graph(graph, Fleet(8, 1.0), rng=np.random.default_rng(0), budget="brkga100")
    assert plan.parts == 3
    assert plan.bottleneck_s == 3.0
    assert "3 operators; 5 machines are left out" in plan.assumptions[0]
    assert plan_graph(graph, Fleet(3, 1.0), rng=np.random.default_rng(0), budget="slice").assumptions == ()


def test_parts_that_would_cost_more_than_they_save_are_not_made() -> None:
    graph = chain([1.0, 1.0, 1.0], [100.0, 100.0, 100.0])
    plan = plan_graph(graph, Fleet(3, 1.0), rng=np.random.default_rng(0), budget="brkga100")
    assert plan.parts == 1
    assert plan.bottleneck_s == 3.0


def test_out_of_time_it_still_has_the_natural_orders_and_says_so() -> None:
    case = KINDS["layered"](60, np.random.default_rng(4))
    fleet = Fleet(5, case.bytes_per_s)
    left = iter([1.0, 1.0, *[0.0] * 10_000])
    stopped = plan_graph(case.graph, fleet, rng=np.random.default_rng(0), remaining_s=lambda: next(left))
    sliced = plan_graph(case.graph, fleet, rng=np.random.default_rng(0), budget="slice", prove=False)
    assert stopped.bottleneck_s <= sliced.bottleneck_s
    assert any("stopped" in note for note in stopped.assumptions)


def test_a_warm_order_is_never_lost() -> None:
    case = KINDS["layered"](60, np.random.default_rng(5))
    fleet = Fleet(5, case.bytes_per_s)
    good = plan_graph(case.graph, fleet, rng=np.random.default_rng(0), budget="brkga100", prove=False)
    warm = lined_up(case.graph, np.array(good.part_of), np.arange(60))
    plan = plan_graph(
        case.graph, fleet, rng=np.random.default_rng(0), budget="slice", warm=[warm.tolist()], prove=False
    )
    assert plan.bottleneck_s <= good.bottleneck_s * (1 + 1e-9)
    assert plan.method == "slice, warm 0"


def test_what_cannot_fit_is_refused() -> None:
    graph = OperatorGraph(("a", "b"), np.ones(2), np.ones(2), np.array([(0, 1)]), np.array([5.0, 5.0]))
    assert plan_graph(graph, Fleet(2, 1.0, 5.0, True), rng=np.random.default_rng(0), budget="brkga100").parts == 2
    with pytest.raises(NotEnoughMemory, match="2 parts"):
        plan_graph(graph, Fleet(2, 1.0, 4.0, True), rng=np.random.default_rng(0), budget="brkga100")
    soft = plan_graph(graph, Fleet(2, 1.0, 4.0), rng=np.random.default_rng(0), budget="brkga100")
    assert soft.bottleneck_s == 3.0  # 1 of work, 1 of io, 1 byte of 5 over


def test_an_unknown_budget_and_a_warm_order_that_is_none_are_refused() -> None:
    graph = chain([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(BadOption, match="brkga100"):
        plan_graph(graph, Fleet(2, 1.0), rng=np.random.default_rng(0), budget="much")
    with pytest.raises(BadOption, match="order"):
        plan_graph(graph, Fleet(2, 1.0), rng=np.random.default_rng(0), warm=[[1, 0]])


def test_the_short_cut_of_the_decoder_does_not_change_what_evolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs beyond the elite's worst are not looked for; the engine must take the same way as with all of them."""
    monkeypatch.setitem(BUDGETS, "engine", Budget(20, 24, 2, 0, 0))
    case = KINDS["layered"](50, np.random.default_rng(6))

    def plan() -> graph_planner.GraphPlan:
        return plan_graph(
            case.graph, Fleet(4, case.bytes_per_s), rng=np.random.default_rng(7), budget="engine", prove=False
        )

    short = plan()
    asked: list[float] = []
    exact = graph_planner.slice_orders

    def all_of_them(graph, orders, fleet, at_most_s=np.inf):
        asked.append(at_most_s)
        return exact(graph, orders, fleet)

    monkeypatch.setattr(graph_planner, "slice_orders", all_of_them)
    assert plan() == short
    assert any(np.isfinite(asked)), "the short cut was never taken"


def test_natural_orders_are_orders_and_keys_give_them_again() -> None:
    graph = random_graph(np.random.default_rng(8), 30, 0.1)
    orders = natural_orders(graph)
    assert all(is_order(graph, order) for order in orders.values())
    stacked = np.stack(list(orders.values()))
    assert (kahn_orders(graph, keys_of(stacked)) == stacked).all()


@pytest.mark.parametrize("memory", [np.inf, 3.0])
def test_moves_change_costs_by_what_they_say(memory: float) -> None:
    rng = np.random.default_rng(9)
    for _ in range(6):
        graph, fleet = random_graph(rng, 12, 0.2), Fleet(4, 2.0, memory)
        _, part = best_slice(graph, kahn_orders(graph, rng.random((1, 12)))[0], fleet)
        loads = _Loads(graph, fleet, part)
        for _ in range(60):
            v = int(rng.integers(12))
            low, high = loads.bounds(v)
            to = int(rng.integers(low, high + 1))
            if to != loads.part[v]:
                loads.move(v, to, loads.changes(v, to))
            exact = part_costs(graph, loads.part, fleet)
            assert loads.cost[: len(exact)] == pytest.approx(exact)
            assert loads.cost[len(exact) :] == pytest.approx([0.0] * (4 - len(exact)), abs=1e-9)
            assert quotient_is_acyclic(graph, loads.part)


def test_refining_improves_and_never_overflows_hard_memory() -> None:
    case = KINDS["layered"](80, np.random.default_rng(10))
    graph = OperatorGraph(
        case.graph.names, case.graph.work_V, case.graph.output_V, case.graph.edges_E2, np.ones(80), np.ones(80)
    )
    fleet = Fleet(5, case.bytes_per_s, 18.0, hard_memory=True)
    cost_s, part = best_slice(graph, kahn_orders(graph, graph.depth_V[None] * 1.0)[0], fleet)
    refined_s, refined = refine(graph, fleet, part, rng=np.random.default_rng(0), moves=40_000)
    assert refined_s < cost_s
    assert np.bincount(refined).max() <= 17
    assert refined_s == pytest.approx(part_costs(graph, refined, fleet).max())
