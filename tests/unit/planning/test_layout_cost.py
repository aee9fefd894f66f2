"""What a layout is worth, and when a plan is worth a move."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId
from bsns.core.plan import Objective
from bsns.planning.layouts import Cost, layout_cost, why_move
from bsns.planning.problem import ChainProblem, Stage

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
FAST, SLOW = Objective(1.0, 0.0), Objective(0.0, 1.0)


def problem(time: tuple[float, ...] = (1.0, 1.0, 2.0), hop: float = 0.5, blocks: int = 4) -> ChainProblem:
    count = len(time)
    hop_NN = np.full((count, count), hop)
    np.fill_diagonal(hop_NN, 0.0)
    return ChainProblem(
        work_L=np.ones(blocks),
        bytes_L=np.ones(blocks),
        time_N=np.array(time),
        memory_N=np.full(count, 100.0),
        hop_NN=hop_NN,
        entry_N=np.full(count, 0.25),
        exit_N=np.full(count, 0.25),
        client_s=0.125,
        peers=(A, B, C)[:count],
    )


def at(*ranges: tuple[int, int]) -> tuple[BlockRange, ...]:
    return tuple(BlockRange(start, end) for start, end in ranges)


@pytest.mark.parametrize("objective", [FAST, SLOW, Objective(0.5, 0.5)])
def test_a_chain_costs_what_it_costs(objective: Objective) -> None:
    held = {A: at((0, 1)), B: at((1, 3)), C: at((3, 4))}
    chain = (Stage(0, 0, 1), Stage(1, 1, 3), Stage(2, 3, 4))
    cost = layout_cost(problem(), held, objective)
    assert (cost.bottleneck_s, cost.latency_s) == pytest.approx(problem().cost(chain))


def test_missing_blocks_make_a_layout_worthless() -> None:
    assert layout_cost(problem(), {A: at((0, 2)), B: at((3, 4))}, FAST).value(FAST) == math.inf
    assert layout_cost(problem(), {}, SLOW).value(SLOW) == math.inf
    assert layout_cost(problem(), {PeerId("gone"): at((0, 4))}, SLOW).value(SLOW) == math.inf


def test_nodes_that_hold_the_same_share_the_work() -> None:
    alone = layout_cost(problem(), {A: at((0, 4))}, FAST)
    both = layout_cost(problem(), {A: at((0, 4)), B: at((0, 4))}, FAST)
    assert alone == Cost(4.25, 4.625)
    assert both.bottleneck_s == pytest.approx(4.25 / 2)
    assert both.latency_s == pytest.approx(4.625)


def test_a_node_does_not_count_twice() -> None:
    """It holds all, and another half of that: what it gives to one half it cannot give to the other."""
    cost = layout_cost(problem(), {A: at((0, 4)), B: at((2, 4))}, FAST)
    assert cost.bottleneck_s == pytest.approx(2.5)  # A computes 0:2, B the rest, after a hop


def test_latency_takes_the_fastest_way_through_what_overlaps() -> None:
    held = {A: at((0, 2)), B: at((1, 4)), C: at((0, 4))}
    assert layout_cost(problem(), held, SLOW).latency_s == pytest.approx(0.25 + 4 + 0.5 + 0.25 + 0.125)


def test_a_node_that_moves_may_hold_two_ranges_but_is_on_a_way_once() -> None:
    assert layout_cost(problem(), {A: at((0, 2), (2, 4))}, SLOW).value(SLOW) == math.inf
    cost = layout_cost(problem(), {A: at((0, 2), (2, 4)), B: at((0, 2))}, SLOW)
    assert cost.latency_s == pytest.approx(0.25 + 4 + 0.5 + 0.25 + 0.125)


HELD = {A: BlockRange(0, 2), B: BlockRange(2, 4)}
OTHER = {A: BlockRange(0, 1), B: BlockRange(1, 4)}
GROWN = {**HELD, C: BlockRange(0, 2)}


@pytest.mark.parametrize(
    ("values", "ordered", "new", "moves"),
    [
        ((1.0, 1.0, 0.5), HELD, HELD, False),
        ((1.0, 1.0, 0.89), HELD, OTHER, True),
        ((1.0, 1.0, 0.91), HELD, OTHER, False),
        ((1.0, 1.2, 0.91), HELD, OTHER, False),
        ((1.0, 0.95, 0.89), HELD, OTHER, False),  # nodes are on their way to something nearly as good
        ((math.inf, math.inf, 5.0), HELD, OTHER, True),
        ((math.inf, math.inf, 5.0), {}, OTHER, True),
        ((1.0, math.inf, 1.5), HELD, OTHER, True),
        ((math.inf, 1.0, 0.95), HELD, OTHER, False),  # what is missing is being loaded already
        ((1.0, 1.0, 0.95), HELD, GROWN, True),
        ((1.0, 1.0, 1.0), HELD, GROWN, False),
        ((1.0, 1.0, 0.95), {}, GROWN, False),
    ],
)
def test_when_to_move(
    values: tuple[float, float, float], ordered: dict[PeerId, BlockRange], new: dict[PeerId, BlockRange], moves: bool
) -> None:
    assert (why_move(*values, ordered, new) is not None) == moves
