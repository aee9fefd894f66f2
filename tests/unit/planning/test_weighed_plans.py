"""Plans by a user's own weights: the cheapest chain by them, or what is true of the chain that was found instead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from bsns.core.errors import MissingBlocks
from bsns.core.ids import ModelId
from bsns.core.plan import Objective, Plan
from bsns.core.snapshot import MAX_PRICE, ModelShape, Snapshot
from bsns.planning.account import against, proof
from bsns.planning.network import chain_problem
from bsns.planning.planner import Clock, plan_by_weights
from bsns.planning.problem import Chain, ChainProblem, Stage
from bsns.planning.selection import MOST_WEIGHT, PRESETS, TERMS, Traits, Weighed, Weights, select
from bsns.planning.weighed_rivals import FORBIDDEN, compared
from bsns.topology.synthetic import synthetic

FAST = PRESETS["fast"]
LATENCY = Objective.named("latency")


def shape(blocks: int = 12, total_bytes: float = 16e9, work: tuple[float, ...] = ()) -> ModelShape:
    return ModelShape(ModelId("m"), "m", (int(total_bytes / blocks),) * blocks, 0, 8192, work)


def tight(nodes: int, share: float, seed: int = 0) -> Snapshot:
    """Unequal nodes, of whose memory the model takes this share."""
    snapshot = synthetic("uniform", nodes, np.random.default_rng(seed))
    factor = 16e9 / share / sum(node.memory_bytes for node in snapshot.nodes)
    scaled = (replace(node, memory_bytes=int(node.memory_bytes * factor)) for node in snapshot.nodes)
    return replace(snapshot, nodes=tuple(scaled))


def planned(
    snapshot: Snapshot,
    weights: Weights,
    model: ModelShape | None = None,
    *,
    objective: Objective = LATENCY,
    remaining_s: Clock = lambda: 5.0,
) -> Plan:
    return plan_by_weights(
        snapshot,
        model or shape(),
        weights,
        objective=objective,
        cache_tokens=0,
        client_s=0.001,
        rng=np.random.default_rng(0),
        remaining_s=remaining_s,
    )


def chain_of(plan: Plan, problem: ChainProblem) -> Chain:
    number = {peer: node for node, peer in enumerate(problem.peers)}
    return tuple(Stage(number[stage.peers[0]], stage.blocks.start, stage.blocks.end) for stage in plan.stages)


def every_chain(problem: ChainProblem) -> Iterator[Chain]:
    """All chains that fit."""
    blocks = problem.block_count
    for count in range(1, min(problem.node_count, blocks) + 1):
        for cuts in combinations(range(1, blocks), count - 1):
            ranges = list(pairwise((0, *cuts, blocks)))
            for nodes in permutations(range(problem.node_count), count):
                chain = tuple(Stage(node, *ends) for node, ends in zip(nodes, ranges, strict=True))
                if problem.fits(chain):
                    yield chain


@pytest.mark.parametrize("seed", range(3))
def test_where_memory_is_short_the_fast_weights_still_give_the_shortest_chain(seed: int) -> None:
    snapshot, model = tight(8, 0.27, seed), shape(32)
    plan = planned(snapshot, FAST, model)
    assert plan.latency_s == pytest.approx(plan.lower_bound_s, rel=1e-6)
    assert "no chain is cheaper by them" in plan.method
    problem = chain_problem(snapshot, model, client_s=0.001)
    picked = select(problem, FAST)
    assert picked is not None
    assert plan.latency_s <= problem.cost(picked)[1] * (1 + 1e-9)


@pytest.mark.parametrize(
    "weights",
    [FAST, Weights(memory=0.3, price=0.02), Weights(work=0.0, latency=0.0, price=1.0), Weights(reputation=3.0)],
)
@pytest.mark.parametrize("work", [(), (1.0, 2.0, 1.0, 0.5, 1.0, 1.0)])
def test_a_chain_said_to_be_the_cheapest_is(weights: Weights, work: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    bare = tight(4, 0.6)
    nodes = (replace(n, price=float(rng.choice([1, 2, 3])), reputation=float(rng.random())) for n in bare.nodes)
    snapshot, model = replace(bare, nodes=tuple(nodes)), shape(6, work=work)
    problem = chain_problem(snapshot, model)
    weighed = Weighed.of(problem, weights, Traits.of(snapshot.nodes))
    plan = planned(snapshot, weights, model)
    least = min(map(weighed.cost, every_chain(problem)))
    cost = weighed.cost(chain_of(plan, problem))
    if "no chain is cheaper" in plan.method:
        assert cost == pytest.approx(least, rel=1e-6)
    else:
        assert "best found" in plan.method
        assert work, "for equal blocks there is a proof"
        assert cost >= least * (1 - 1e-9)


def test_what_time_did_not_allow_to_prove_is_said() -> None:
    plan = planned(tight(16, 0.3), FAST, shape(32), remaining_s=lambda: 0.0)
    assert "best found in time, not proven" in plan.method
    assert plan.lower_bound_s < plan.latency_s


def test_reasons_do_not_speak_of_what_was_not_weighed() -> None:
    bare = tight(8, 0.27)
    small = replace(bare.nodes[7], memory_bytes=10)
    snapshot = replace(bare, nodes=(*bare.nodes[:7], small))
    plan = planned(snapshot, FAST, shape(32))
    reasons = {left.peer: left.reason for left in plan.left_out}
    assert "no room for one block" in reasons.pop(small.peer)
    assert set(reasons.values()) == {"your weights prefer others"}


def test_who_is_not_attested_is_told_so() -> None:
    bare = tight(4, 0.3)
    snapshot = replace(bare, nodes=tuple(replace(node, attested=n < 3) for n, node in enumerate(bare.nodes)))
    plan = planned(snapshot, PRESETS["attested-only"])
    reasons = {left.peer: left.reason for left in plan.left_out}
    assert reasons[bare.nodes[3].peer] == "it is not attested, which your weights ask for"
    with pytest.raises(MissingBlocks, match="these weights allow"):
        planned(bare, PRESETS["attested-only"])


def test_a_dead_end_of_the_picks_is_no_end() -> None:
    weights, model = Weights(lookahead=0.0), shape(32)
    snapshot = tight(12, 0.27)
    problem = chain_problem(snapshot, model)
    assert select(problem, weights) is None
    plan = planned(snapshot, weights, model)
    assert "dead end" in plan.method
    assert problem.fits(chain_of(plan, problem))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("term", TERMS)
def test_the_greatest_figures_do_not_overflow(term: str) -> None:
    bare = tight(4, 0.6)
    dearest = replace(bare.nodes[0], price=MAX_PRICE, block_time_s=1e6, reputation=0.0)
    plan = planned(replace(bare, nodes=(dearest, *bare.nodes[1:])), replace(PRESETS["cheap"], **{term: MOST_WEIGHT}))
    assert np.isfinite(plan.latency_s)


def test_others_chains_are_compared_by_the_weights() -> None:
    """By throughput, which was not asked for, a chain may well be better than the cheapest one."""
    bare = tight(4, 0.2)
    nodes = tuple(
        replace(node, memory_bytes=10**11, price=price)
        for node, price in zip(bare.nodes, (1.0, 5.0, 5.0, 5.0), strict=True)
    )
    model = shape()
    plan = planned(replace(bare, nodes=nodes), Weights(price=1e6), model, objective=Objective())
    faster = [other for other in plan.alternatives if other.bottleneck_s and other.bottleneck_s < plan.bottleneck_s]
    assert faster
    for other in faster:
        words = against(plan, other)
        assert "× by your weights" in words, words
        assert float(words.split()[0]) > 1
    assert "by the objective throughput, which your weights need not follow" in proof(plan)
    assert "from the best possible chain" in proof(plan)


def test_a_chain_of_nodes_that_weights_forbid_is_no_rival() -> None:
    bare = tight(4, 0.2)
    nodes = tuple(replace(node, memory_bytes=10**11, attested=n == 3) for n, node in enumerate(bare.nodes))
    plan = planned(replace(bare, nodes=nodes), PRESETS["attested-only"])
    assert {against(plan, other) for other in plan.alternatives} <= {FORBIDDEN, "the same by your weights"}
    assert FORBIDDEN in {against(plan, other) for other in plan.alternatives}


@pytest.mark.parametrize(
    ("cost", "chosen", "words"),
    [
        (2.0, 2.0, "the same"),
        (0.0, 0.0, "the same"),
        (2.004, 2.0, "hardly more"),
        (1.996, 2.0, "hardly less"),
        (3.0, 2.0, "1.50 ×"),
        (1.0, 2.0, "0.50 ×"),
        (1e9, 2.0, "over 1000 ×"),
        (1.0, 0.0, "over 1000 ×"),
    ],
)
def test_costs_by_weights_in_words(cost: float, chosen: float, words: str) -> None:
    assert compared(cost, chosen) == f"{words} by your weights"
