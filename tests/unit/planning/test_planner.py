"""The planner: never worse than any rival's rule, honest about its bound, and clear about what is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bsns.core.errors import BadSnapshot, NotEnoughMemory
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import Link, ModelShape, NodeView, Snapshot, pair
from bsns.planning.network import Network, chain_problem
from bsns.planning.planner import Clock, make_plan, solve_chain
from bsns.planning.problem import ChainProblem, Stage
from bsns.planning.rival_rules import RULES
from bsns.topology.synthetic import KINDS, synthetic

OBJECTIVES = [Objective.named(name) for name in ("throughput", "latency", "mixed")]


def shape(blocks: int = 12, total_bytes: float = 16e9, dtype: str = "bfloat16") -> ModelShape:
    return ModelShape(ModelId("m"), "m", (int(total_bytes / blocks),) * blocks, 0, 8192, dtype=dtype)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def steps(count: int) -> Clock:
    """A clock that says there is a second left, so many times."""
    left = iter([1.0] * count)
    return lambda: next(left, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("nodes", [1, 4, 12])
def test_no_rival_is_better_and_no_bound_is_broken(kind, objective: Objective, nodes: int) -> None:  # type: ignore[no-untyped-def]
    problem = chain_problem(synthetic(kind, nodes, rng()), shape())
    solved = solve_chain(problem, objective, rng=rng(), remaining_s=steps(12))
    assert problem.fits(solved.chain)
    assert (solved.bottleneck_s, solved.latency_s) == problem.cost(solved.chain)
    assert solved.lower_bound_s <= solved.value
    for rule in RULES.values():
        chain = rule(problem)
        assert chain is None or solved.value <= problem.value(chain, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("replicas", [True, False])
def test_a_plan_agrees_with_itself(objective: Objective, replicas: bool) -> None:
    snapshot = synthetic("uniform", 12, rng())
    plan = make_plan(
        snapshot,
        shape(),
        objective=objective,
        cache_tokens=0,
        client_s=0.001,
        rng=rng(),
        remaining_s=steps(200),
        replicas=replicas,
    )
    assert [stage.blocks.start for stage in plan.stages] == [0, *(stage.blocks.end for stage in plan.stages[:-1])]
    assert plan.stages[-1].blocks.end == plan.block_count
    held = list(plan.assignments)
    assert len(held) == sum(len(stage.peers) for stage in plan.stages), "each node once"
    assert set(held) | {left.peer for left in plan.left_out} == {node.peer for node in snapshot.nodes}
    assert plan.lower_bound_s <= plan.value
    assert plan.gap == pytest.approx(plan.value / plan.lower_bound_s - 1)
    assert plan.latency_s == pytest.approx(sum(s.compute_s + s.transfer_s for s in plan.stages) + 0.001)
    slowest_s = max(stage.compute_s + stage.transfer_s for stage in plan.stages)
    assert plan.bottleneck_s <= slowest_s * (1 + 1e-9)
    if not replicas:
        assert plan.bottleneck_s == pytest.approx(max(slowest_s, 0.001))
    assert {entry.name for entry in plan.alternatives} >= {*RULES, "one node alone"}


def test_a_small_model_is_copied_rather_than_cut() -> None:
    """Adding machines must not make it slower: where the model fits single nodes, each takes whole tokens."""
    peers = [PeerId(name) for name in "abcd"]
    nodes = tuple(NodeView(peer, 0.001, 10**9) for peer in peers)
    links = {pair(one, other): Link(0.2) for one in peers for other in peers if one < other}
    plan = make_plan(Snapshot(0.0, nodes, links), shape(8, 1e8), cache_tokens=0, rng=rng(), remaining_s=steps(100))
    assert len(plan.stages) == 1
    assert len(plan.stages[0].peers) == 4
    assert plan.bottleneck_s == pytest.approx(0.008 / 4)
    assert plan.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [12, 60])
def test_where_no_time_is_left_a_small_model_is_copied_all_the_same(kind, nodes: int) -> None:  # type: ignore[no-untyped-def]
    """On a busy machine all of the time may be gone before the first search: what costs next to nothing comes first."""
    snapshot = synthetic(kind, nodes, np.random.default_rng(1))
    hurried, patient = (
        make_plan(snapshot, shape(30, 2e8), cache_tokens=0, rng=rng(), remaining_s=steps(count)) for count in (0, 20)
    )
    assert len(hurried.stages) == 1
    assert hurried.bottleneck_s == pytest.approx(patient.bottleneck_s)
    assert hurried.gap < 0.1


def test_where_no_time_is_left_a_few_nodes_still_share_what_even_cuts_allow() -> None:
    peers = [PeerId(name) for name in "abcdef"]
    nodes = tuple(NodeView(peer, 0.001, 5 * 10**7) for peer in peers)  # half of the model each
    links = {pair(one, other): Link(0.0001) for one in peers for other in peers if one < other}
    plan = make_plan(Snapshot(0.0, nodes, links), shape(8, 1e8), cache_tokens=0, rng=rng(), remaining_s=steps(0))
    assert [len(stage.peers) for stage in plan.stages] == [3, 3]


def test_what_is_missing_is_said_with_the_precision_that_would_fit() -> None:
    nodes = tuple(NodeView(PeerId(name), 0.001, 2 * 2**30) for name in "ab")
    with pytest.raises(NotEnoughMemory, match=r"3 GiB are missing; in int8 it would fit"):
        make_plan(Snapshot(0.0, nodes), shape(28, 7 * 2**30), cache_tokens=0, rng=rng(), remaining_s=steps(9))
    with pytest.raises(NotEnoughMemory, match=r"not fit in int4 either"):
        make_plan(Snapshot(0.0, nodes), shape(28, 70 * 2**30), cache_tokens=0, rng=rng(), remaining_s=steps(9))
    with pytest.raises(NotEnoughMemory, match=r"enough in total, but blocks of 1.5 GiB do not divide"):
        make_plan(
            Snapshot(0.0, nodes[:1] + (NodeView(PeerId("c"), 0.001, 2**30),) * 1),
            shape(2, 3 * 2**30),
            cache_tokens=0,
            rng=rng(),
            remaining_s=steps(9),
        )


def test_nodes_left_out_are_told_why() -> None:
    a, b, c, d = (PeerId(name) for name in "abcd")
    nodes = (
        NodeView(a, 0.001, 10**9),
        NodeView(b, 0.5, 10**9),
        NodeView(c, 0.001, 10),
        NodeView(d, 0.001, 10**9),
    )
    links = {pair(one, d): Link(2.0) for one in (a, b, c)} | {pair(a, b): Link(0.001), pair(b, c): Link(0.001)}
    client = {peer: Link(0.001) for peer in (a, b, c)} | {d: Link(2.0)}
    plan = make_plan(
        Snapshot(0.0, nodes, links, client),
        shape(4, 1e8),
        cache_tokens=0,
        rng=rng(),
        remaining_s=steps(99),
        replicas=False,
    )
    reasons = {left.peer: left.reason for left in plan.left_out}
    assert "one block alone would take 500 ms on it, the slowest stage takes 4.5 ms" in reasons[b]
    assert "no room for one block" in reasons[c]
    assert "its links are too slow" in reasons[d]


def test_impossible_figures_are_refused() -> None:
    nodes = (NodeView(PeerId("a"), math.nan, 10**9),)
    with pytest.raises(BadSnapshot):
        make_plan(Snapshot(0.0, nodes), shape(), rng=rng(), remaining_s=steps(9))


def test_a_thousand_nodes_with_few_measured_links() -> None:
    snapshot = synthetic("lan_wan", 1000, rng())
    plan = make_plan(snapshot, shape(32), cache_tokens=0, rng=rng(), remaining_s=steps(20))
    assert plan.lower_bound_s <= plan.value
    assert len(plan.assignments) + len(plan.left_out) == 1000


def hops_by_hand(snapshot: Snapshot, size: float) -> np.ndarray:
    """Every pair's way: what was measured, else the slower of the two nodes' medians."""
    index = {node.peer: number for number, node in enumerate(snapshot.nodes)}
    ways = {
        frozenset((index[one], index[other])): link.round_trip_s / 2 + size / link.bytes_per_s
        for (one, other), link in snapshot.links.items()
    }
    count = len(index)
    overall_s = float(np.median(list(ways.values())))
    own = [[way for ends, way in ways.items() if node in ends] for node in range(count)]
    typical = [float(np.median(some)) if some else overall_s for some in own]
    table = [
        [0.0 if a == b else ways.get(frozenset((a, b)), max(typical[a], typical[b])) for b in range(count)]
        for a in range(count)
    ]
    return np.array(table)


@pytest.mark.parametrize("dense", [True, False])
def test_the_network_says_what_each_way_costs(dense: bool) -> None:
    snapshot = synthetic("uniform", 30, rng(), dense=dense)
    network = Network.of(snapshot, shape(), cache_tokens=7, client_s=0.001)
    one = network.problem(range(30))
    assert np.allclose(one.hop_NN, hops_by_hand(snapshot, shape().hidden_bytes))
    assert any("links were not measured" in note for note in one.assumptions) == (not dense)
    some = network.problem([9, 2, 17])
    assert np.allclose(some.hop_NN, one.hop_NN[np.ix_([9, 2, 17], [9, 2, 17])])
    assert some.time_N.tolist() == one.time_N[[9, 2, 17]].tolist()
    nodes, share = np.array([3, 5, 8]), np.array([0.2, 0.5, 0.3])
    others = [node for node in range(30) if node not in (3, 5, 8)]
    assert np.allclose(network.mean_way(nodes, share)[others], (share @ one.hop_NN[nodes])[others])
    hop_NN = one.hop_NN + np.diag(np.full(30, np.inf))
    assert (network.floors().way_N <= hop_NN.min(axis=0) + 1e-12).all()


def test_more_nodes_than_blocks() -> None:
    problem = chain_problem(synthetic("uniform", 12, rng(), model_bytes=1e9), shape(2, 1e9))
    solved = solve_chain(problem, Objective(), rng=rng(), remaining_s=steps(9))
    assert problem.fits(solved.chain)


def test_warm_chains_count(  # the planner never returns worse than what it was given
) -> None:
    problem: ChainProblem = chain_problem(synthetic("uniform", 3, rng(), model_bytes=1e9), shape(4, 1e6))
    warm = (Stage(2, 0, 1), Stage(0, 1, 4))
    solved = solve_chain(problem, Objective(), rng=rng(), remaining_s=lambda: 0.0, warm=[warm], engines=())
    assert solved.value <= problem.value(warm, Objective())
