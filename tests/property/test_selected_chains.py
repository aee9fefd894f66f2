"""Selection by weights, against every chain there is, and the decoder that looks for weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.blocks import BlockRange
from bsns.core.plan import Objective
from bsns.planning.brkga import Settings
from bsns.planning.problem import Chain, ChainProblem, Stage
from bsns.planning.selection import PRESETS, Traits, Weights, fitting_reach, held_reach, select
from bsns.planning.walks import Ints
from bsns.planning.weight_decoder import best_by_weights, chain_by, decode_weights, default_keys
from bsns.routing.chain import Wish, best_chain

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "routing"))
sys.path.insert(0, str(Path(__file__).parent))
from test_chain import known
from test_shortest_chain import BLOCKS, Swarm, swarms

FAST = PRESETS["fast"]


@st.composite
def problems(draw: st.DrawFn, nodes: int = 4, blocks: int = 5) -> ChainProblem:
    count, length = draw(st.integers(1, nodes)), draw(st.integers(1, blocks))
    times = st.sampled_from([0.0005, 0.001, 0.002, 0.02])
    ways = st.sampled_from([0.0, 0.001, 0.003, 0.01])

    def row(strategy: st.SearchStrategy[float], size: int = count) -> np.ndarray:
        return np.array(draw(st.lists(strategy, min_size=size, max_size=size)))

    hop_NN = row(ways, count * count).reshape(count, count)
    hop_NN = np.maximum(hop_NN, hop_NN.T)
    np.fill_diagonal(hop_NN, 0.0)
    return ChainProblem(
        work_L=row(st.sampled_from([0.5, 1.0, 2.0]), length),
        bytes_L=row(st.sampled_from([1.0, 2.0, 3.0]), length),
        time_N=row(times),
        memory_N=row(st.sampled_from([1.0, 3.0, 6.0, 20.0])),
        hop_NN=hop_NN,
        entry_N=row(ways),
        exit_N=row(ways),
        client_s=0.0,
        peers=tuple(f"p{n}" for n in range(count)),
    )


def every_chain(reach_NL: Ints, reached: int = 0, used: frozenset[int] = frozenset()) -> Iterator[Chain]:
    nodes, blocks = reach_NL.shape
    if reached == blocks:
        yield ()
        return
    for node in set(range(nodes)) - used:
        for end in range(reached + 1, int(reach_NL[node, reached]) + 1):
            for tail in every_chain(reach_NL, end, used | {node}):
                yield (Stage(node, reached, end), *tail)


@settings(max_examples=150)
@given(problems())
def test_with_the_latency_weights_nothing_is_shorter(problem: ChainProblem) -> None:
    chains = [chain for chain in every_chain(fitting_reach(problem)) if problem.fits(chain)]
    chosen = select(problem, FAST)
    if chosen is None:
        assert not chains
        return
    assert chosen in chains
    assert problem.cost(chosen)[1] == pytest.approx(min(problem.cost(chain)[1] for chain in chains), abs=1e-12)


@settings(max_examples=100)
@given(swarms())
def test_with_the_latency_weights_it_is_the_shortest_route(swarm: Swarm) -> None:
    nodes, round_trips, links = swarm
    held = [node.ranges for node in nodes]
    if not any(True for _ in every_chain(held_reach(held, BLOCKS))):
        return

    def spent_s(wish: Wish) -> float:
        knowledge = known(nodes, round_trips, links)
        route = best_chain(nodes, BLOCKS, knowledge, needed_tokens=10, wish=wish)
        by_peer = {node.peer: node for node in nodes}
        total_s, before = knowledge.snapshot.client[route[-1].peer].transfer_s(0), None
        for hop in route:
            way = knowledge.snapshot.link(before, hop.peer) if before else None
            way = way or knowledge.snapshot.client[hop.peer]
            total_s += way.transfer_s(0) + len(hop.blocks) * by_peer[hop.peer].block_time_s
            before = hop.peer
        return total_s

    assert spent_s(Wish(weights=FAST)) == pytest.approx(spent_s(Wish()), abs=1e-11)


@settings(max_examples=100)
@given(
    problems(),
    st.lists(st.floats(0, 3), min_size=4, max_size=4),
    st.lists(st.floats(0, 2), min_size=4, max_size=4),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_with_the_whole_lookahead_nothing_is_better_by_the_users_weights(
    problem: ChainProblem, prices: list[float], reputations: list[float], fullness: list[float]
) -> None:
    count, blocks = problem.node_count, problem.block_count
    price_N, reputation_N, fullness_N = (np.array(row[:count]) for row in (prices, reputations, fullness))
    traits = Traits(price_N, reputation_N, np.zeros(count, np.bool_), fullness_N)
    weights = Weights(work=0.5, latency=2.0, memory=0.01, reputation=0.02, price=0.003)
    reach_NL = held_reach([(BlockRange(0, blocks),)] * count, blocks)

    def worth(chain: Chain) -> float:
        total, before = weights.latency * problem.exit_N[chain[-1].node], None
        for node, start, end in chain:
            way_s = problem.entry_N[node] if before is None else problem.hop_NN[before, node]
            filled = np.minimum(problem.bytes_L[start:end] / problem.memory_N[node], 1).sum()
            share = (end - start) / blocks
            total += weights.work * problem.work_L[start:end].sum() * problem.time_N[node] + weights.latency * way_s
            total += weights.memory * (filled + fullness_N[node] * share)
            total += weights.reputation * (1 - reputation_N[node]) * share + weights.price * price_N[node] * (
                end - start
            )
            before = node
        return float(total)

    chosen = select(problem, weights, traits=traits, reach_NL=reach_NL)
    assert chosen is not None
    assert worth(chosen) == pytest.approx(min(map(worth, every_chain(reach_NL))), abs=1e-12)


@settings(max_examples=25)
@given(problems(), st.sampled_from(["latency", "throughput", "mixed"]), st.integers(0, 9))
def test_looking_for_weights_never_beats_every_chain_nor_loses_to_the_default(
    problem: ChainProblem, name: str, seed: int
) -> None:
    objective = Objective.named(name)
    found = best_by_weights(problem, objective, np.random.default_rng(seed), Settings(population=6, generations=3))
    default = chain_by(problem, FAST)
    if found is None:
        assert default is None
        return
    assert problem.fits(found.chain)
    value = problem.value(found.chain, objective)
    assert value == found.evolved.cost == decode_weights(problem, objective)(found.evolved.keys[None, :])[0]
    assert value >= min(problem.value(chain, objective) for chain in every_chain(fitting_reach(problem))) - 1e-12
    if default is not None:
        assert value <= problem.value(default, objective)
        assert decode_weights(problem, objective)(default_keys()[None, :])[0] == problem.value(default, objective)
