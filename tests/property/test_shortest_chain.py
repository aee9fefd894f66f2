"""The best chain, against every chain there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.blocks import BlockRange
from bsns.core.errors import MissingBlocks
from bsns.core.ids import PeerId
from bsns.core.snapshot import Pair, pair
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Wish, best_chain

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "routing"))
from test_chain import known, record

Chosen = list[tuple[NodeRecord, int, int]]
Swarm = tuple[list[NodeRecord], dict[str, float], dict[str, float]]
BLOCKS = 6


def every_chain(nodes: list[NodeRecord], reached: int = 0) -> Iterator[Chosen]:
    if reached == BLOCKS:
        yield []
    for node in nodes:
        rest = [other for other in nodes if other is not node]
        for end in range(reached + 1, BLOCKS + 1):
            if any(blocks.covers(BlockRange(reached, end)) for blocks in node.ranges):
                for tail in every_chain(rest, end):
                    yield [(node, reached, end), *tail]


def stage_times(chosen: Chosen, round_trips: dict[str, float], links: dict[Pair, float]) -> list[int]:
    """Picoseconds of each stage, its way in included, and of the way back."""
    times, before = [], None
    for node, start, end in chosen:
        way_s = round_trips[node.peer] / 2
        if before is not None:
            way_s = links.get(pair(before.peer, node.peer), 2 * way_s) / 2
        times.append(round(way_s * 1e12) + (end - start) * round(node.block_time_s * 1e12))
        before = node
    return [*times, round(round_trips[chosen[-1][0].peer] / 2 * 1e12)]


@st.composite
def swarms(draw: st.DrawFn) -> Swarm:
    nodes, round_trips = [], {}
    times = st.sampled_from([0.0, 0.001, 0.002, 0.02])
    ways = st.sampled_from([0.0, 0.002, 0.004, 0.01])
    for n in range(draw(st.integers(1, 5))):
        ranges = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            start = draw(st.integers(0, BLOCKS - 1))
            ranges.append((start, draw(st.integers(start + 1, BLOCKS))))
        (start, end), *others = ranges
        cache = draw(st.sampled_from([10, 20, 30]))
        speed = draw(times)
        name = chr(ord("a") + n)
        nodes.append(record(name, start, end, others=tuple(others), block_time_s=speed, cache_tokens_left=cache))
        round_trips[name] = draw(ways)
    keys = [a.peer + b.peer for a in nodes for b in nodes if a.peer < b.peer]
    measured = draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    return nodes, round_trips, {key: draw(ways) for key in measured}


def check(swarm: Swarm, wish: Wish) -> tuple[Chosen, list[Chosen]] | None:
    """The chain found, shown to be one, and every chain there is; None if there is none and that was said."""
    nodes, round_trips, links = swarm
    chains = list(every_chain(nodes))
    try:
        route = best_chain(nodes, BLOCKS, known(nodes, round_trips, links), needed_tokens=10, wish=wish)
    except MissingBlocks:
        assert not chains
        return None
    by_peer = {node.peer: node for node in nodes}
    chosen = [(by_peer[hop.peer], hop.blocks.start, hop.blocks.end) for hop in route]
    assert chosen in chains
    return chosen, chains


def by_pair(links: dict[str, float]) -> dict[Pair, float]:
    return {pair(PeerId(key[0]), PeerId(key[1])): time_s for key, time_s in links.items()}


@settings(max_examples=300)
@given(swarms())
def test_nothing_is_shorter(swarm: Swarm) -> None:
    _, round_trips, links = swarm

    def rank(chosen: Chosen) -> tuple[int, int, int]:
        times = stage_times(chosen, round_trips, by_pair(links))
        return sum(times), len(chosen), -min(n.cache_tokens_left for n, _, _ in chosen)

    found = check(swarm, Wish())
    if found is not None:
        assert rank(found[0]) == min(map(rank, found[1]))


@settings(max_examples=300)
@given(swarms())
def test_nothing_is_wider(swarm: Swarm) -> None:
    _, round_trips, links = swarm

    def rank(chosen: Chosen) -> tuple[int, int, int]:
        times = stage_times(chosen, round_trips, by_pair(links))
        return max(times), sum(times), len(chosen)

    found = check(swarm, Wish("throughput"))
    if found is not None:
        assert rank(found[0]) == min(map(rank, found[1]))
