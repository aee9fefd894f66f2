"""Weights as users write them, and what they change."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import NodeView
from bsns.planning.brkga import Settings
from bsns.planning.problem import ChainProblem, Stage
from bsns.planning.selection import PRESETS, Traits, Weights, held_reach, select
from bsns.planning.weight_decoder import best_by_weights

A, B, C = (PeerId(name) for name in "ABC")


def problem(times: list[float], memory: list[float], hop_s: float = 0.001, blocks: int = 4) -> ChainProblem:
    count = len(times)
    hop_NN = np.full((count, count), hop_s)
    np.fill_diagonal(hop_NN, 0.0)
    ends_N = np.full(count, hop_s)
    return ChainProblem(
        np.ones(blocks),
        np.ones(blocks),
        np.array(times),
        np.array(memory),
        hop_NN,
        ends_N,
        ends_N,
        0.0,
        (A, B, C)[:count],
    )


def traits(**fields: list[float]) -> Traits:
    count = len(next(iter(fields.values())))
    views = [
        NodeView(PeerId(str(n)), 0.001, 1, **{name: values[n] for name, values in fields.items()}) for n in range(count)
    ]
    return Traits.of(views)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("fast", Weights()),
        ("cheap", PRESETS["cheap"]),
        ("attested-only", Weights(attested_only=True)),
        ("latency=1,price=0.5", Weights(price=0.5)),
        (" trusted , price = 2 , attested-only", Weights(reputation=10.0, price=2.0, attested_only=True)),
        ("lookahead=0,work=3", Weights(work=3.0, lookahead=0.0)),
    ],
)
def test_weights_as_users_write_them(text: str, weights: Weights) -> None:
    assert Weights.parse(text) == weights


@pytest.mark.parametrize(
    "text",
    [
        "",
        "quick",
        "price",
        "price=",
        "price=much",
        "price=-1",
        "price=nan",
        "price=inf",
        "cheap=1",
        "fast,cheap",
        "price=1,price=2",
    ],
)
def test_weights_that_make_no_sense(text: str) -> None:
    with pytest.raises(BadOption):
        Weights.parse(text)


def test_something_must_be_weighed() -> None:
    with pytest.raises(BadOption, match="nothing is weighed"):
        Weights(work=0, latency=0)


def test_each_weight_changes_the_chain() -> None:
    two = problem([0.001, 0.002], [9.0, 9.0])
    slow = (Stage(1, 0, 4),)
    assert select(two, PRESETS["fast"]) == (Stage(0, 0, 4),)
    assert select(two, Weights(price=0.01), traits=traits(price=[2.0, 1.0])) == slow
    assert select(two, PRESETS["trusted"], traits=traits(reputation=[0.5, 1.0])) == slow
    full = traits(cache_tokens=[10, 10], cache_tokens_left=[1, 9])
    assert select(two, Weights(memory=1.0), traits=full) == slow
    assert select(problem([0.001, 0.002], [4.0, 40.0]), Weights(memory=1.0)) == slow
    assert select(two, PRESETS["attested-only"], traits=traits(attested=[False, True])) == slow
    assert select(two, PRESETS["fast"], banned={A}) == slow


def test_memory_and_held_ranges_bound_what_is_taken() -> None:
    two = problem([0.001, 0.002], [3.0, 2.0])
    chosen = select(two, PRESETS["fast"])
    assert chosen is not None
    assert {stage.node: stage.end - stage.start for stage in chosen} == {0: 3, 1: 1}
    held = held_reach([[BlockRange(2, 4)], [BlockRange(0, 3)]], 4)
    assert select(two, PRESETS["fast"], reach_NL=held) == (Stage(1, 0, 2), Stage(0, 2, 4))


def test_whoever_holds_a_range_has_room_for_it() -> None:
    held = held_reach([[BlockRange(0, 4)], [BlockRange(2, 4)]], 4)
    chosen = select(problem([0.002, 0.001], [1.0, 1.0], hop_s=0.0), PRESETS["fast"], reach_NL=held)
    assert chosen == (Stage(0, 0, 2), Stage(1, 2, 4))


def test_without_a_look_ahead_the_next_step_is_all_that_counts() -> None:
    # The nearest first step leads to a node whose way on is long.
    hop_NN = np.array([[0.0, 0.5, 0.5], [0.5, 0.0, 0.01], [0.5, 0.01, 0.0]])
    entry_N = np.array([0.001, 0.01, 0.01])
    three = ChainProblem(
        np.ones(2), np.ones(2), np.full(3, 0.001), np.ones(3), hop_NN, entry_N, np.zeros(3), 0.0, (A, B, C)
    )
    greedy = select(three, Weights(lookahead=0.0))
    assert greedy is not None
    assert greedy[0].node == 0
    chosen = select(three, PRESETS["fast"])
    assert chosen is not None
    assert [stage.node for stage in chosen] in ([1, 2], [2, 1])
    assert three.cost(chosen)[1] < three.cost(greedy)[1]


@pytest.mark.parametrize("weights", [PRESETS["fast"], Weights(lookahead=0.0)])
def test_what_cannot_be_completed_is_not_begun(weights: Weights) -> None:
    # Whoever takes the fast node first has nobody for the end: the others hold only the beginning.
    three = problem([0.001, 0.002, 0.003], [9.0, 9.0, 9.0])
    held = held_reach([[BlockRange(0, 4)], [BlockRange(0, 2)], [BlockRange(1, 3)]], 4)
    chosen = select(three, weights, reach_NL=held)
    assert chosen is not None
    assert chosen[-1] == Stage(0, chosen[-1].start, 4)


def test_too_little_memory_in_all_is_a_dead_end() -> None:
    two = problem([0.001, 0.002], [1.0, 2.0])
    assert select(two, PRESETS["fast"]) is None
    assert select(two, PRESETS["fast"], max_cases=0) is None
    assert best_by_weights(two, Objective(), np.random.default_rng(0), Settings(population=4, generations=2)) is None


def test_infinite_memory_is_room_enough() -> None:
    assert select(problem([0.001], [math.inf]), Weights(memory=1.0)) == (Stage(0, 0, 4),)
