"""Chains: shortest, complete, and clear about why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, CacheFull, MissingBlocks
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, pair
from bsns.planning.selection import Weights
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Hop, Knowledge, Route, Wish, at_once, best_chain
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


def test_measured_ways_between_nodes_decide() -> None:
    nodes = (record("a", 0, 3), record("b", 3, 6), record("c", 3, 6))
    rtt = {"a": 0.002, "b": 0.004, "c": 0.004}
    assert walk(chain(*nodes, rtt=rtt, links={"ab": 0.01, "ac": 0.02})) == [("a", "0:3"), ("b", "3:6")]
    assert walk(chain(*nodes, rtt=rtt, links={"ab": 0.02, "ac": 0.01})) == [("a", "0:3"), ("c", "3:6")]
    # of one that nobody measured it is believed that it takes as long as from the client
    assert walk(chain(*nodes, rtt=rtt, links={"ab": 0.0041})) == [("a", "0:3"), ("c", "3:6")]


def test_the_way_back_counts() -> None:
    nodes = (record("a", 0, 3), record("b", 3, 6), record("c", 3, 6))
    links = {"ab": 0.001, "ac": 0.002}
    assert walk(chain(*nodes, rtt={"b": 0.02, "c": 0.001}, links=links)) == [("a", "0:3"), ("c", "3:6")]


def test_bandwidth_counts_for_what_a_hop_carries() -> None:
    nodes = [record("a", 0, 3), record("b", 3, 6), record("c", 3, 6)]
    thin, thick = Link(0.001, bytes_per_s=1e6), Link(0.002, bytes_per_s=1e9)
    base = known(nodes)
    links = {pair(PeerId("a"), PeerId("b")): thin, pair(PeerId("a"), PeerId("c")): thick}
    base = replace(base, snapshot=replace(base.snapshot, links=links))
    for size, last in ((0, "b"), (4096, "c")):
        route = best_chain(nodes, 6, base, needed_tokens=1, wish=Wish(hop_bytes=size))
        assert walk(route)[-1][0] == last


def test_a_node_that_moves_is_used_in_one_of_its_ranges() -> None:
    mover = record("a", 0, 3, others=((3, 6),), block_time_s=0.0001)
    assert walk(chain(mover, record("b", 3, 6))) == [("a", "0:3"), ("b", "3:6")]
    assert walk(chain(mover, record("b", 0, 3))) == [("b", "0:3"), ("a", "3:6")]
    with pytest.raises(MissingBlocks, match="each node used once"):
        chain(mover)
    with pytest.raises(MissingBlocks, match=r"5:6 \(b has 0:1, 5:6 and is leaving\)"):
        chain(record("a", 0, 3, others=((3, 5),)), record("b", 0, 1, others=((5, 6),), state="leaving"))


def test_a_silent_node_is_the_last_resort_wherever_it_stands() -> None:
    nodes = [record("a", 0, 2), record("b", 2, 4), record("c", 2, 4, block_time_s=0.5), record("d", 4, 6)]
    base = known(nodes, links={"ab": 0.0, "bd": 0.0})
    silent = replace(base, silent={PeerId("b")})
    assert walk(best_chain(nodes, 6, base, needed_tokens=1))[1][0] == "b"
    assert walk(best_chain(nodes, 6, silent, needed_tokens=1))[1][0] == "c"
    assert walk(best_chain([nodes[0], nodes[1], nodes[3]], 6, silent, needed_tokens=1))[1][0] == "b"


def test_a_busy_node_counts_as_slower() -> None:
    nodes = [record("a", 0, 6, block_time_s=0.01), record("b", 0, 6, block_time_s=0.014)]
    for sessions, chosen in ((0, "a"), (1, "a"), (2, "b")):  # a second row costs a quarter of the first
        base = replace(known(nodes), sessions={PeerId("a"): sessions})
        assert walk(best_chain(nodes, 6, base, needed_tokens=1)) == [(chosen, "0:6")]


def test_throughput_shares_the_work() -> None:
    nodes = (record("a", 0, 6), record("b", 2, 6, block_time_s=0.0011))
    rtt = {"a": 0.001, "b": 0.001}
    assert walk(chain(*nodes, rtt=rtt)) == [("a", "0:6")]
    assert walk(chain(*nodes, rtt=rtt, wish=Wish("throughput"))) == [("a", "0:3"), ("b", "3:6")]


@pytest.mark.parametrize("aim", ["latency", "throughput"])
def test_a_route_is_no_deeper_than_the_protocol_allows(aim: Any) -> None:
    islands = [record(f"i{n}", n, n + 1, block_count=70) for n in range(70)]
    with pytest.raises(MissingBlocks, match="at most 64 nodes"):
        best_chain(islands, 70, known(islands), needed_tokens=1, wish=Wish(aim))
    slow = record("slow", 10, 40, block_count=70, block_time_s=0.01)
    nodes = [*islands, slow]
    route = best_chain(nodes, 70, known(nodes), needed_tokens=1, wish=Wish(aim))
    assert len(route) == 64
    assert [len(hop.blocks) for hop in route if hop.peer == "slow"] == [7]
    assert [block for hop in route for block in hop.blocks] == list(range(70))


def test_weights_choose_another_chain() -> None:
    nodes = (record("a", 0, 6, price=3.0), record("b", 0, 6, block_time_s=0.002, price=1.0))
    assert walk(chain(*nodes)) == [("a", "0:6")]
    assert walk(chain(*nodes, wish=Wish(weights=Weights.parse("fast")))) == [("a", "0:6")]
    assert walk(chain(*nodes, wish=Wish(weights=Weights.parse("cheap")))) == [("b", "0:6")]
    # the fast node saves 6 ms per token and costs 12 more: worth it below half a millisecond each
    assert walk(chain(*nodes, wish=Wish(weights=Weights.parse("price=0.0004")))) == [("a", "0:6")]
    assert walk(chain(*nodes, wish=Wish(weights=Weights.parse("price=0.0006")))) == [("b", "0:6")]


def test_attested_nodes_only() -> None:
    nodes = [record("a", 0, 6), record("b", 0, 3), record("c", 3, 6)]
    base = known(nodes)
    views = tuple(replace(node, attested=node.peer != "a") for node in base.snapshot.nodes)
    base = replace(base, snapshot=replace(base.snapshot, nodes=views))
    wish = Wish(weights=Weights.parse("attested-only"))
    assert walk(best_chain(nodes, 6, base, needed_tokens=1, wish=wish)) == [("b", "0:3"), ("c", "3:6")]
    with pytest.raises(MissingBlocks, match=r"no attested node serves blocks 3:6 \(a has 0:6 and is not attested"):
        best_chain(nodes[:2], 6, base, needed_tokens=1, wish=wish)


def test_wishes_that_make_no_sense() -> None:
    with pytest.raises(BadOption, match="latency or throughput"):
        Wish("speed")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="either"):
        Wish("throughput", Weights())


@pytest.mark.parametrize(
    ("stages", "count"),
    [
        ([(b"", 1.0)] * 3, 3),
        ([(b"m", 0.5)] * 6, 2),
        ([(b"m", 0.5)] * 2, 2),
        ([(b"m", 0.25)] * 3, 3),
        ([(b"m", 1.0)] * 3, 1),
        ([(b"m", 1.0)] * 3 + [(b"n", 1.0)] * 2 + [(b"", 1.0)], 3),
        ([(b"m", 1.0), (b"m", 0.25)], 2),
    ],
)
def test_stages_that_share_a_machine_take_turns(stages: list[tuple[bytes, float]], count: int) -> None:
    records = [
        record(str(n), n, n + 1 if n + 1 < len(stages) else 6, machine=machine, share=share)
        for n, (machine, share) in enumerate(stages)
    ]
    assert at_once(chain(*records)) == count
