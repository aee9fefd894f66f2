"""Graph planning on random graphs: the cut against the plain recurrence, plans and bounds against every partition."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning.graph import Fleet, OperatorGraph, is_order, kahn_orders, part_costs, quotient_is_acyclic
from bsns.planning.graph_bounds import Bounds
from bsns.planning.graph_planner import plan_graph
from bsns.planning.segments import segment_costs
from bsns.planning.slicing import best_slice, slice_orders

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "planning"))
from graphs import best_of_all, plain_slice

FIGURES = st.sampled_from([0.0, 0.1, 1.0, 1.5, 2.0, 7.0])


@st.composite
def graphs(draw: st.DrawFn, most: int) -> OperatorGraph:
    count = draw(st.integers(1, most))
    shuffled = draw(st.permutations(range(count)))
    pairs = [(shuffled[u], shuffled[v]) for v in range(count) for u in range(v)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=2 * most)) if pairs else []
    figures = [draw(st.lists(FIGURES, min_size=count, max_size=count)) for _ in range(4)]
    return OperatorGraph(
        tuple(f"op{v}" for v in range(count)),
        np.array(figures[0]),
        np.array(figures[1]),
        np.array(edges, dtype=np.intp).reshape(-1, 2),
        np.array(figures[2]),
        np.array(figures[3]),
    )


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    return Fleet(
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0.5, 1.0, 10.0])),
        draw(st.sampled_from([math.inf, 0.0, 5.0])),
        draw(st.booleans()),
    )


@settings(max_examples=150)
@given(graphs(9), fleets(), st.integers(0, 10**6))
def test_the_cut_is_that_of_the_plain_recurrence(graph: OperatorGraph, fleet: Fleet, seed: int) -> None:
    orders = kahn_orders(graph, np.random.default_rng(seed).random((3, graph.count)))
    found = slice_orders(graph, orders, fleet)
    for order, cost_s in zip(orders, found, strict=True):
        assert is_order(graph, order)
        plain_s = plain_slice(segment_costs(graph, order, fleet), fleet.machines)
        assert cost_s == pytest.approx(plain_s)
        cut_s, part = best_slice(graph, order, fleet)
        assert cut_s == pytest.approx(plain_s)
        if math.isfinite(cut_s):
            assert part_costs(graph, part, fleet).max() == pytest.approx(cut_s)
            assert part.max() < fleet.machines
            assert quotient_is_acyclic(graph, part)
            limited = slice_orders(graph, order[None], fleet, cut_s)
            assert limited[0] == pytest.approx(cut_s)


@settings(max_examples=60)
@given(graphs(5), st.integers(1, 3), st.sampled_from([0.5, 1.0, 10.0]), st.sampled_from([math.inf, 0.0, 5.0]))
def test_plans_and_bounds_enclose_the_optimum(
    graph: OperatorGraph, machines: int, bytes_per_s: float, memory: float
) -> None:
    fleet = Fleet(machines, bytes_per_s, memory)
    best_s = best_of_all(graph, fleet)
    bounds = Bounds(graph)
    assert bounds.quick(fleet).value_s <= best_s * (1 + 1e-9)
    bound = bounds.lower(fleet, best_s * 1.2 + 0.1)
    assert bound.value_s <= best_s * (1 + 1e-6) + 1e-12
    plan = plan_graph(graph, fleet, rng=np.random.default_rng(0), budget="slice")
    assert plan.lower_bound_s <= best_s * (1 + 1e-6) + 1e-12
    assert best_s * (1 - 1e-9) <= plan.bottleneck_s <= best_s * (1 + 3e-4) + 1e-12
    assert quotient_is_acyclic(graph, plan.part_of)
