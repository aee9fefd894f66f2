"""Walks and chains: what the property tests of routing and selection do not reach."""

from __future__ import annotations

import numpy as np

from bsns.core.blocks import BlockRange
from bsns.planning.problem import Stage
from bsns.planning.selection import held_reach
from bsns.planning.walks import Ways, cheapest_chain


def ways(held: list[list[tuple[int, int]]], costs: list[int], blocks: int) -> Ways:
    reach_NL = held_reach([[BlockRange(*edges) for edges in ranges] for ranges in held], blocks)
    none_N = np.zeros(len(held), np.int64)
    cost_NL = np.repeat(np.array(costs, np.int64)[:, None], blocks, axis=1)
    return Ways(cost_NL, np.zeros((len(held), len(held)), np.int64), none_N, none_N, reach_NL)


def test_a_walk_may_come_back_and_a_chain_may_not() -> None:
    problem = ways([[(0, 6)], [(2, 4)]], [10, 1], 6)
    best = problem.table(problem.everything()).best()
    assert best is not None
    assert best[1] == (Stage(0, 0, 2), Stage(1, 2, 4), Stage(0, 4, 6))
    chain = cheapest_chain(problem)
    assert chain is not None
    assert chain[1] == (Stage(0, 0, 6),)
    assert chain[0] == problem.cost(chain[1]) > best[0]


def test_without_cases_a_chain_is_found_all_the_same() -> None:
    # Both fast nodes are moving and would do both ends; whoever decides for one of them is led to a chain.
    problem = ways([[(0, 2), (4, 6)], [(0, 2), (4, 6)], [(2, 4)], [(0, 6)]], [1, 1, 5, 99], 6)
    best = problem.table(problem.everything()).best()
    assert best is not None
    for max_cases in (0, 200):
        chain = cheapest_chain(problem, max_cases=max_cases)
        assert chain is not None
        assert [stage.node for stage in chain[1]] in ([0, 2, 1], [1, 2, 0])


def test_costs_beyond_measure_do_not_overflow() -> None:
    problem = ways([[(0, 6)], [(0, 6)]], [2**62, -(2**62)], 6)
    chain = cheapest_chain(problem)
    assert chain is not None
    assert chain[1] == (Stage(1, 0, 6),)


def test_nothing_covers_what_nobody_holds() -> None:
    assert cheapest_chain(ways([[(0, 3)], [(4, 6)]], [1, 1], 6)) is None
    assert cheapest_chain(ways([[(0, 3), (3, 6)]], [1], 6)) is None
