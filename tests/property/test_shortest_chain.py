"""The shortest chain, against every chain there is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.errors import MissingBlocks
from bsns.core.ids import PeerId
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import shortest_chain

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "routing"))
from test_chain import record

Chosen = list[tuple[NodeRecord, int, int]]


def every_chain(nodes: list[NodeRecord], block_count: int, reached: int = 0) -> Iterator[Chosen]:
    if reached == block_count:
        yield []
    for node in nodes:
        if node.start <= reached < node.end:
            rest = [other for other in nodes if other is not node]
            for end in range(reached + 1, min(node.end, block_count) + 1):
                for tail in every_chain(rest, block_count, end):
                    yield [(node, reached, end), *tail]


def rank(chosen: Chosen, latencies: dict[PeerId, float]) -> tuple[int, int, int]:
    time = sum(
        round(latencies[n.peer] * 1e12) + (end - start) * round(n.block_time_s * 1e12) for n, start, end in chosen
    )
    return time, len(chosen), -min(n.cache_tokens_left for n, _, _ in chosen)


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[NodeRecord], dict[PeerId, float]]:
    nodes, round_trips = [], {}
    for n in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, 4))
        node = record(
            f"p{n}",
            start,
            draw(st.integers(start + 1, 6)),
            block_time_s=draw(st.sampled_from([0.0, 0.001, 0.002, 0.02])),
            cache_tokens_left=draw(st.sampled_from([10, 20, 30])),
        )
        nodes.append(node)
        round_trips[node.peer] = draw(st.sampled_from([0.0, 0.002, 0.004, 0.01]))
    return nodes, round_trips


@settings(max_examples=300, deadline=None)
@given(swarms())
def test_nothing_is_shorter(swarm: tuple[list[NodeRecord], dict[PeerId, float]]) -> None:
    nodes, round_trips = swarm
    latencies = {peer: time_s / 2 for peer, time_s in round_trips.items()}
    ranks = [rank(chosen, latencies) for chosen in every_chain(nodes, 6)]
    try:
        route = shortest_chain(nodes, 6, round_trip_s=round_trips, needed_tokens=10)
    except MissingBlocks:
        assert not ranks
        return
    by_peer = {node.peer: node for node in nodes}
    chosen = [(by_peer[hop.peer], hop.blocks.start, hop.blocks.end) for hop in route]
    assert [start for _, start, _ in chosen] == [0, *(end for _, _, end in chosen[:-1])]
    assert chosen[-1][2] == 6
    assert len({hop.peer for hop in route}) == len(route)
    assert all(by_peer[hop.peer].blocks.covers(hop.blocks) for hop in route)
    assert rank(chosen, latencies) == min(ranks)
