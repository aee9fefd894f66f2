"""Operator graphs: what is refused, JSON, orders by Kahn, costs of parts by hand, and the acyclicity check."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest
from graphs import chain, random_graph

from bsns.core.errors import BadGraph, BadOption
from bsns.planning.graph import (
    Fleet,
    OperatorGraph,
    is_order,
    kahn,
    kahn_orders,
    order_of_parts,
    part_costs,
    quotient_is_acyclic,
)


def graph_of(edges: list[tuple[int, int]], count: int = 4, **figures: np.ndarray) -> OperatorGraph:
    given = {"work_V": np.ones(count), "output_V": np.ones(count)} | figures
    return OperatorGraph(tuple("abcdef"[:count]), edges_E2=np.array(edges, dtype=int).reshape(-1, 2), **given)


def test_a_cycle_is_refused_and_named_in_the_direction_of_its_edges() -> None:
    with pytest.raises(BadGraph) as refused:
        graph_of([(0, 1), (1, 2), (2, 3), (3, 1)])
    way = str(refused.value).split(": ")[1].split(" → ")
    assert way[0] == way[-1]
    assert set(way) == {"b", "c", "d"}
    assert {(one, other) for one, other in itertools.pairwise(way)} == {("b", "c"), ("c", "d"), ("d", "b")}
    with pytest.raises(BadGraph, match="a → a"):
        graph_of([(0, 0)])


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", ["work_V", "output_V", "param_V", "peak_V"])
def test_impossible_figures_are_refused_by_name(name: str, wrong: float) -> None:
    with pytest.raises(BadGraph, match=f"'b': {name}"):
        graph_of([], **{name: np.array([1.0, wrong, 1.0, 1.0])})


def test_other_nonsense_is_refused() -> None:
    with pytest.raises(BadGraph, match="unknown"):
        graph_of([(0, 4)])
    with pytest.raises(BadGraph, match="unknown"):
        graph_of([(-1, 2)])
    with pytest.raises(BadGraph, match="shape"):
        graph_of([], work_V=np.ones(3))
    with pytest.raises(BadGraph, match="two operators"):
        OperatorGraph(("a", "a"), np.ones(2), np.ones(2), np.zeros((0, 2)))
    with pytest.raises(BadGraph, match="0 operators"):
        OperatorGraph((), np.ones(0), np.ones(0), np.zeros((0, 2)))


@pytest.mark.parametrize(
    "wrong", [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, math.nan, 1.0), (1, 1.0, -1.0), (1, 1.0, math.nan)]
)
def test_impossible_fleets_are_refused(wrong: tuple[int, float, float]) -> None:
    with pytest.raises(BadOption):
        Fleet(*wrong)


def test_an_edge_given_twice_counts_once_and_figures_cannot_be_changed() -> None:
    work = np.ones(4)
    graph = graph_of([(0, 1), (0, 1), (1, 2)], work_V=work)
    assert graph.edges_E2.tolist() == [[0, 1], [1, 2]]
    work[0] = 5.0
    assert graph.work_V[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        graph.work_V[0] = 2.0


def test_json_there_and_back() -> None:
    graph = random_graph(np.random.default_rng(0), 9)
    again = OperatorGraph.from_json(graph.to_json())
    assert again.names == graph.names
    for name in ("work_V", "output_V", "param_V", "peak_V", "edges_E2"):
        assert (getattr(again, name) == getattr(graph, name)).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "not an operator graph"),
        ({"operators": [{"name": "a", "work_s": "x"}], "edges": []}, "not an operator graph"),
        ({"operators": [{"name": "a", "work_s": 1, "colour": 1}], "edges": []}, "not an operator graph"),
        ({"operators": [{"name": "a", "work_s": 1}], "edges": [["a", "b"]]}, "'b'"),
        ({"operators": [{"name": "a", "work_s": 1}], "edges": [], "version": 9}, "version 9"),
        ({"operators": [{"name": "a", "work_s": -1}], "edges": []}, "work_V"),
        ({"operators": [{"name": "a", "work_s": 1}] * 2, "edges": []}, "two operators"),
    ],
)
def test_files_that_are_wrong_are_refused_with_the_reason(value: object, reason: str) -> None:
    with pytest.raises(BadGraph, match=reason):
        OperatorGraph.from_json(msgspec.json.encode(value))
    with pytest.raises(BadGraph):
        OperatorGraph.from_json(b"[" * 100_000)


def test_kahn_takes_the_ready_operator_of_the_least_rank() -> None:
    graph = graph_of([(0, 2), (1, 2), (2, 3)])
    assert kahn(graph, [1, 0, 2, 3]) == [1, 0, 2, 3]
    assert kahn(graph, [3, 2, 1, 0]) == [1, 0, 2, 3]
    assert kahn_orders(graph, np.array([[0.9, 0.1, 0.0, 0.0]])).tolist() == [[1, 0, 2, 3]]


def test_every_order_can_be_had_and_none_but_orders() -> None:
    graph = random_graph(np.random.default_rng(2), 6)
    for order in itertools.permutations(range(6)):
        keys = np.empty(6)
        keys[list(order)] = np.arange(6) / 6
        assert (kahn_orders(graph, keys[None])[0].tolist() == list(order)) == is_order(graph, order)
    assert not is_order(graph, [0, 0, 1, 2, 3, 4])


def test_costs_of_parts_by_hand() -> None:
    graph = graph_of(
        [(0, 1), (0, 2), (1, 3), (2, 3)],
        output_V=np.array([10.0, 20.0, 40.0, 80.0]),
        param_V=np.array([1.0, 2.0, 3.0, 4.0]),
        peak_V=np.array([5.0, 0.0, 7.0, 1.0]),
    )
    assert part_costs(graph, [0, 1, 0, 1], Fleet(2, 10.0)).tolist() == [2 + 1 + 4, 2 + 1 + 4]
    assert part_costs(graph, [0, 1, 2, 2], Fleet(3, 10.0)).tolist() == [1 + 1, 1 + 1 + 2, 2 + 1 + 2]
    # parameters 4 and 6 bytes, the greediest 7 and 1: 11 and 7 of 8 bytes
    assert part_costs(graph, [0, 1, 0, 1], Fleet(2, 10.0, 8.0)).tolist() == pytest.approx([7.3, 7.0])
    assert part_costs(graph, [0, 1, 0, 1], Fleet(2, 10.0, 8.0, hard_memory=True)).tolist() == [math.inf, 7.0]
    assert part_costs(graph, [0, 0, 0, 0], Fleet(2, 10.0)).tolist() == [4.0]


def test_the_check_finds_cycles_between_parts() -> None:
    graph = graph_of([(0, 1), (1, 2), (2, 3)])
    assert quotient_is_acyclic(graph, [0, 0, 1, 1])
    assert quotient_is_acyclic(graph, [5, 5, 2, 2])
    assert not quotient_is_acyclic(graph, [0, 1, 1, 0])
    assert not quotient_is_acyclic(graph, [0, 1, 2, 0])


def test_the_check_agrees_with_orders_on_every_labelling() -> None:
    graph = random_graph(np.random.default_rng(3), 5, 0.5)
    for labels in itertools.product(range(3), repeat=5):
        works = any(
            all(rank[labels[u]] <= rank[labels[v]] for u, v in graph.edges_E2.tolist())
            for rank in itertools.permutations(range(3))
        )
        assert quotient_is_acyclic(graph, labels) == works


def test_parts_are_renumbered_in_an_order_in_which_they_can_be_computed() -> None:
    graph = chain([1.0] * 5, [1.0] * 5)
    assert order_of_parts(graph, [9, 9, 4, 7, 7]).tolist() == [0, 0, 1, 2, 2]
