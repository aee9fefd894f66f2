"""Chains: shortest, complete, and clear about why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import CacheFull, MissingBlocks
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, pair
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Hop, Knowledge, Route, Wish, best_chain
from bsns.swarm.snapshot import snapshot

FIELDS: dict[str, Any] = {
    "addresses": ("/ip4/127.0.0.1/tcp/1",),
    "model": ModelId("m"),
    "model_name": "m",
    "block_count": 6,
    "state": "serving",
    "device": "cpu",
    "dtype": "bfloat16",
    "executor": "torch",
    "threads": 1,
    "cache_tokens": 1000,
    "cache_tokens_left": 1000,
    "block_time_s": 0.001,
    "rss_bytes": 0,
    "version": "0",
    "started_s": 0.0,
    "expires_s": 0.0,
}


def record(peer: str, start: int, end: int, **fields: Any) -> NodeRecord:
    return NodeRecord(**(FIELDS | {"peer": PeerId(peer), "start": start, "end": end} | fields))


def known(
    records: Sequence[NodeRecord], rtt: Mapping[str, float] | None = None, links: Mapping[str, float] | None = None
) -> Knowledge:
    """What a client knows that measured round trips to nodes, and nodes theirs to each other ("ab")."""
    ways = {pair(PeerId(key[0]), PeerId(key[1])): Link(time_s) for key, time_s in (links or {}).items()}
    client = {PeerId(peer): Link(time_s) for peer, time_s in (rtt or {}).items()}
    return Knowledge(replace(snapshot(records, 0.0), links=ways, client=client))


def chain(
    *records: NodeRecord,
    needed: int = 10,
    rtt: dict[str, float] | None = None,
    links: dict[str, float] | None = None,
    avoid: str = "",
    wish: Wish | None = None,
) -> Route:
    avoided = {PeerId(peer) for peer in avoid}
    return best_chain(records, 6, known(records, rtt, links), needed_tokens=needed, avoid=avoided, wish=wish)


def walk(route: Route) -> list[tuple[str, str]]:
    return [(hop.peer, str(hop.blocks)) for hop in route]


def test_one_node_that_holds_all() -> None:
    assert chain(record("a", 0, 6)) == (Hop(PeerId("a"), BlockRange(0, 6), ("/ip4/127.0.0.1/tcp/1",)),)


def test_a_hop_may_use_less_than_a_node_holds() -> None:
    assert walk(chain(record("a", 0, 4), record("b", 2, 6, block_time_s=0.0001))) == [("a", "0:2"), ("b", "2:6")]


def test_latency_decides() -> None:
    nodes = (record("a", 0, 3), record("b", 3, 6), record("c", 3, 6))
    assert walk(chain(*nodes, rtt={"b": 0.05, "c": 0.01})) == [("a", "0:3"), ("c", "3:6")]
    assert walk(chain(*nodes, rtt={"b": 0.01, "c": 0.05})) == [("a", "0:3"), ("b", "3:6")]
    assert walk(chain(*nodes, rtt={"b": 0.05})) == [("a", "0:3"), ("c", "3:6")]  # unmeasured: 1 ms


def test_ties_go_to_fewer_hops_then_more_cache() -> None:
    halves = (record("a", 0, 3), record("b", 3, 6))
    assert walk(chain(*halves, record("c", 0, 6), rtt={"c": 0.003})) == [("c", "0:6")]
    assert walk(chain(*halves, record("c", 0, 6), rtt={"c": 0.003001})) == [("a", "0:3"), ("b", "3:6")]
    assert walk(chain(record("a", 0, 6, cache_tokens_left=50), record("b", 0, 6))) == [("b", "0:6")]
    assert walk(chain(record("a", 0, 6), record("b", 0, 6, cache_tokens_left=50))) == [("a", "0:6")]


def test_a_node_is_used_once() -> None:
    # Fastest would be slow 0:2, fast 2:4, slow again 4:6.
    nodes = (record("slow", 0, 6, block_time_s=0.01), record("fast", 2, 4, block_time_s=0.0))
    rtt = {"slow": 0.002, "fast": 0.002}
    assert walk(chain(*nodes, rtt=rtt)) == [("slow", "0:6")]
    other = record("other", 4, 6, block_time_s=0.011)
    assert walk(chain(*nodes, other, rtt=rtt)) == [("slow", "0:2"), ("fast", "2:4"), ("other", "4:6")]


@pytest.mark.parametrize("state", ["joining", "leaving"])
def test_only_serving_nodes(state: str) -> None:
    with pytest.raises(MissingBlocks, match=rf"3:6 \(b has 3:6 and is {state}\)"):
        chain(record("a", 0, 3), record("b", 3, 6, state=state))


def test_avoided_nodes() -> None:
    assert walk(chain(record("a", 0, 6), record("b", 0, 6), avoid="a")) == [("b", "0:6")]
    with pytest.raises(MissingBlocks, match=r"0:6.*a has 0:6 and is set aside"):
        chain(record("a", 0, 6), avoid="a")


def test_missing_ranges_are_named() -> None:
    with pytest.raises(MissingBlocks, match="0:1, 2:3, 5:6"):
        chain(record("a", 1, 2), record("b", 3, 5))
    with pytest.raises(MissingBlocks, match="0:6"):
        chain()


def test_cache_full_says_how_much_is_left() -> None:
    nodes = (record("a", 0, 3), record("b", 3, 6, cache_tokens_left=7))
    assert len(chain(*nodes, needed=7)) == 2
    with pytest.raises(CacheFull, match=r"8 tokens.* 3:6: 7 left on b"):
        chain(*nodes, needed=8)


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), -1.0])
def test_impossible_times_are_not_believed(time_s: float) -> None:
    assert walk(chain(record("a", 0, 6), record("b", 0, 6, block_time_s=time_s))) == [("a", "0:6")]


def test_contrived_records_still_give_a_chain() -> None:
    # Three slow nodes with everything and eight fast islands: the walks that come back are thousands.
    slow = [record(f"s{n}", 0, 80, block_time_s=0.01 + n / 1000) for n in range(3)]
    islands = [record(f"i{n}", 10 * n, 10 * n + 6) for n in range(8)]
    records = [*slow, *islands]
    route = best_chain(records, 80, known(records), needed_tokens=1)
    assert [block for hop in route for block in hop.blocks] == list(range(80))
    assert len({hop.peer for hop in route}) == len(route) == 6
