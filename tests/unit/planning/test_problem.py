"""The chain problem: costs by hand, and what is assumed of what nobody measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bsns.core.errors import BadSnapshot
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import ASSUMED_LINK, Link, ModelShape, NodeView, Snapshot, pair
from bsns.planning.network import chain_problem
from bsns.planning.problem import Stage

SHAPE = ModelShape(ModelId("m"), "m", (100, 100, 200), kv_bytes_per_token_per_block=2, hidden_bytes=1000)
A, B, C = (PeerId(name) for name in "abc")
NODES = (NodeView(A, 0.001, 300), NodeView(B, 0.002, 1000), NodeView(C, 0.004, 1000))
LINKS = {pair(A, B): Link(0.010, 1e6), pair(B, C): Link(0.020, 1e6), pair(A, C): Link(0.040, 1e6)}


def test_costs_by_hand() -> None:
    client = {A: Link(0.002, math.inf), B: Link(0.006, math.inf), C: Link(0.008, math.inf)}
    problem = chain_problem(Snapshot(0.0, NODES, LINKS, client), SHAPE, client_s=0.0005)
    chain = (Stage(0, 0, 2), Stage(1, 2, 3))
    # a: 2 blocks of 1 ms and 1 ms from the client; b: a block of 2 ms, and 5 ms + 1 ms from a; back: 3 ms + 0.5 ms
    assert problem.stage_s(chain) == pytest.approx([0.003, 0.008])
    assert problem.cost(chain) == pytest.approx((0.008, 0.003 + 0.008 + 0.0035))
    assert problem.value(chain, Objective(0.5, 0.5)) == pytest.approx((0.008 + 0.0145) / 2)
    assert problem.assumptions == ()


def test_the_clients_own_turn_can_be_the_bottleneck() -> None:
    problem = chain_problem(Snapshot(0.0, NODES, LINKS), SHAPE, client_s=1.0)
    assert problem.cost((Stage(1, 0, 3),)) == pytest.approx((1.0, 1.006))


def test_what_fits() -> None:
    problem = chain_problem(Snapshot(0.0, NODES, LINKS), SHAPE, cache_tokens=10)
    assert problem.bytes_L.tolist() == [120, 120, 220]
    assert problem.fits((Stage(0, 0, 2), Stage(1, 2, 3)))
    assert not problem.fits((Stage(0, 0, 3),)), "460 bytes do not fit 300"
    assert not problem.fits((Stage(1, 0, 2),)), "a block is missing"
    assert not problem.fits((Stage(1, 0, 2), Stage(1, 2, 3))), "a node twice"
    assert not problem.fits((Stage(1, 0, 1), Stage(2, 2, 3))), "a gap"
    assert not problem.fits(())


def test_an_unmeasured_link_is_as_slow_as_the_slower_of_its_ends_and_says_so() -> None:
    links = {pair(A, B): Link(0.010), pair(B, C): Link(0.030)}
    problem = chain_problem(Snapshot(0.0, NODES, links), SHAPE)
    assert problem.hop_NN[0, 2] == problem.hop_NN[2, 0] == pytest.approx(0.015)
    assert "1 of 3 links" in problem.assumptions[0]
    nothing = chain_problem(Snapshot(0.0, NODES), SHAPE)
    assert nothing.hop_NN[0, 1] == pytest.approx(ASSUMED_LINK.transfer_s(1000))
    assert "no link was measured; each is assumed to have a round trip of 20 ms and 12.5 MB/s" in nothing.assumptions
    assert np.diag(nothing.hop_NN).tolist() == [0, 0, 0]


def test_a_node_without_any_link_is_told_of() -> None:
    problem = chain_problem(Snapshot(0.0, NODES, {pair(A, B): Link(0.010)}), SHAPE)
    assert problem.hop_NN[0, 2] == pytest.approx(0.005)
    assert "the median of all links" in problem.assumptions[1]


def test_ways_of_no_client_count_nothing_and_that_is_said() -> None:
    problem = chain_problem(Snapshot(0.0, NODES, LINKS), SHAPE)
    assert problem.entry_N.tolist() == problem.exit_N.tolist() == [0, 0, 0]
    assert "0 ms" in problem.assumptions[0]


def test_a_node_the_client_did_not_reach_is_as_far_as_its_farthest() -> None:
    problem = chain_problem(Snapshot(0.0, NODES, LINKS, {A: Link(0.002), B: Link(0.008)}), SHAPE)
    assert problem.entry_N.tolist() == pytest.approx([0.001, 0.004, 0.004])
    assert "assumed" in problem.assumptions[0]


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot(0.0, ()),
        Snapshot(0.0, (NodeView(A, math.nan, 1),)),
        Snapshot(0.0, (NodeView(A, 0.0, 1),)),
        Snapshot(0.0, NODES, {pair(A, B): Link(-1.0)}),
        Snapshot(0.0, NODES, {pair(A, B): Link(math.nan)}),
        Snapshot(0.0, NODES, {pair(A, B): Link(0.1, 0.0)}),
        Snapshot(0.0, NODES, {}, {A: Link(0.1, math.nan)}),
        Snapshot(0.0, NODES, {pair(A, B): Link(0.1, 1e-308)}),
        Snapshot(0.0, (NodeView(A, 1e-310, 1),)),
    ],
)
def test_impossible_figures_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(BadSnapshot):
        chain_problem(snapshot, SHAPE)
