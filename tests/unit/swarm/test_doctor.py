"""The doctor's findings, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, Snapshot
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.doctor import findings
from bsns.swarm.snapshot import snapshot

NOW_S = 1_800_000_000.0
GOOD = Link(0.002, 50e6, 0.0002, 5.0)
NAMES = "abc"


def node(name: str, **fields: Any) -> NodeRecord:
    number = ord(name) - ord("a")
    record = NodeRecord(
        peer=PeerId(name),
        addresses=(),
        model=ModelId("m"),
        model_name="a-model",
        block_count=6,
        start=2 * (number % 3),
        end=2 * (number % 3) + 2,
        state="serving",
        device="cpu",
        dtype="bfloat16",
        executor="torch",
        threads=2,
        cache_tokens=10_000,
        cache_tokens_left=9_000,
        block_time_s=0.001,
        rss_bytes=1,
        version="0",
        started_s=NOW_S - 3600,
        expires_s=NOW_S + 60,
        prefill_time_s=0.0001,
        memory_bytes=2**30,
        links=tuple(LinkRecord(PeerId(n), 0.002, 0.0002, 50e6, NOW_S - 5) for n in NAMES if n != name),
    )
    return msgspec.structs.replace(record, **fields)


def link(record: NodeRecord, peer: str, **fields: float) -> NodeRecord:
    """The record with another figure for one link."""
    links = tuple(msgspec.structs.replace(e, **fields) if e.peer == peer else e for e in record.links)
    return msgspec.structs.replace(record, links=links)


def healthy() -> list[NodeRecord]:
    return [node(name) for name in NAMES]


def swarm(**changed: NodeRecord) -> list[NodeRecord]:
    return [changed.get(name, node(name)) for name in NAMES]


def told(records: list[NodeRecord], seen: Snapshot | None = None, **options: Any) -> list[str]:
    """Each finding as kind: peers."""
    seen = seen or snapshot(records, NOW_S)
    return [f"{f.kind}: {' '.join(f.peers)}" for f in findings(records, seen, NOW_S, **options)]


def test_nothing_is_wrong_with_a_healthy_swarm() -> None:
    client = dict.fromkeys(map(PeerId, NAMES), GOOD)
    assert told(healthy(), snapshot(healthy(), NOW_S, client)) == []


def test_an_empty_swarm() -> None:
    (finding,) = findings([], Snapshot(NOW_S, ()), NOW_S)
    assert finding.grave
    assert "bsns serve" in finding.text


def test_nodes_with_like_names_are_told_apart() -> None:
    records = [
        node("a", peer=PeerId("aaaaaaaa-office-1"), cache_tokens_left=10),
        node("b", peer=PeerId("bbbbbbbb-office-1")),
        node("c"),
    ]
    texts = [finding.text for finding in findings(records, snapshot(records, NOW_S), NOW_S)]
    assert any("the cache of node …a-office-1 is nearly full" in text for text in texts)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (swarm(a=node("a", block_time_s=0.002)), ["slow node: a"]),
        (swarm(a=node("a", block_time_s=0.0014)), []),
        (swarm(a=node("a", block_time_s=0.002, threads=1)), []),
        (swarm(a=node("a", block_time_s=0.002, device="cuda")), []),
        (swarm(a=node("a", expires_s=NOW_S + 75 + 12)), ["clock: a"]),
        (swarm(a=node("a", expires_s=NOW_S + 30)), ["clock: a"]),
        (swarm(a=node("a", expires_s=NOW_S + 43)), []),
        (swarm(a=node("a", started_s=NOW_S + 9)), ["clock: a"]),
        (swarm(a=link(node("a"), "b", measured_s=NOW_S + 9)), ["clock: a"]),
        ([node(n, expires_s=NOW_S + 75 + 20) for n in NAMES], ["clock: a b c"]),
        (swarm(a=node("a", cache_tokens=500, cache_tokens_left=500)), ["memory: a"]),
        (swarm(a=node("a", cache_tokens_left=10)), ["memory: a"]),
        (swarm(a=node("a", memory_bytes=0)), ["unmeasured: a"]),
        (swarm(a=node("a", prefill_time_s=0.0)), ["unmeasured: a"]),
        (
            [*swarm(), node("d", state="joining", started_s=NOW_S - 4000, links=())],
            ["loading: d"],
        ),
        ([*swarm(), node("d", state="joining", started_s=NOW_S - 40, links=())], []),
        (swarm(a=link(node("a"), "b", round_trip_s=0.2)), ["slow link: a b"]),
        (swarm(a=link(node("a"), "b", bytes_per_s=0.5e6)), ["slow link: a b"]),
        (swarm(a=link(node("a"), "b", round_trip_s=0.009)), []),
        (swarm(a=link(node("a"), "b", spread_s=0.006)), ["unsteady link: a b"]),
        (swarm(a=link(node("a"), "b", measured_s=NOW_S - 600)), ["stale: a b"]),
        (swarm(a=node("a", state="joining", started_s=NOW_S - 5)), ["missing blocks: "]),
        (swarm(a=node("a", block_count=60)), []),
        (swarm(a=node("a", model=ModelId("n"), model_name="another", start=0, end=6)), ["missing blocks: "]),
    ],
)
def test_a_finding(records: list[NodeRecord], expected: list[str]) -> None:
    assert told(records) == expected


def test_silence_is_grave_and_leaves_blocks_without_a_holder() -> None:
    found = findings(healthy(), snapshot(healthy()[1:], NOW_S), NOW_S, silent={PeerId("a"): "a does not answer"})
    assert [(f.kind, f.grave) for f in found] == [("missing blocks", True), ("no answer", True)]
    assert "--blocks 0:2" in found[0].text


def test_grave_findings_come_first() -> None:
    records = swarm(a=node("a", block_time_s=0.1), b=node("b", state="joining", started_s=NOW_S - 5))
    assert [f.grave for f in findings(records, snapshot(records, NOW_S), NOW_S)] == [True, False]


def test_links_never_measured() -> None:
    records = [msgspec.structs.replace(r, links=r.links if r.peer == "c" else ()) for r in healthy()]
    assert told(records) == ["unmeasured: a b"]
    assert told([msgspec.structs.replace(r, started_s=NOW_S - 10) for r in records]) == []


def test_a_bandwidth_never_measured() -> None:
    records = [link(r, "b" if r.peer == "a" else "a", bytes_per_s=float("inf")) for r in healthy()]
    assert told(records) == ["unmeasured: a b"]


def test_many_gaps_of_one_node_are_one_finding() -> None:
    names = "abcdefgh"
    records = []
    for name in names:
        others = [n for n in names if n != name and "h" not in (n, name)]
        records.append(node(name, links=tuple(LinkRecord(PeerId(n), 0.002, 0.0, 5e7, NOW_S - 5) for n in others)))
    assert told(records) == ["unmeasured: h"]
    (finding,) = findings(records, snapshot(records, NOW_S), NOW_S)
    assert "7 of the ways of node h" in finding.text


def test_in_a_large_swarm_only_neighbours_need_to_know_each_other() -> None:
    names = [chr(ord("a") + number) for number in range(40)]
    records = [node(name, start=number, end=number + 1, block_count=40, links=()) for number, name in enumerate(names)]
    assert len(told(records)) == 39
    records = [
        msgspec.structs.replace(
            record,
            links=tuple(LinkRecord(PeerId(n), 0.01, 0.0, 5e7, NOW_S - 5) for n in names[number + 1 : number + 2]),
        )
        for number, record in enumerate(records)
    ]
    assert told(records) == []


def test_our_own_ways() -> None:
    client = {PeerId("a"): GOOD, PeerId("b"): GOOD, PeerId("c"): replace(GOOD, round_trip_s=0.3)}
    (finding,) = findings(healthy(), snapshot(healthy(), NOW_S, client), NOW_S)
    assert finding.text.startswith("our way to node c is slow: 300 ms round trip, 50 MB/s")


def test_the_only_link_is_slow_only_if_it_is_hopeless() -> None:
    def pair_of(trip_s: float) -> list[NodeRecord]:
        records = [node("a", start=0, end=3), node("b", start=3, end=6)]
        return [link(r, "b" if r.peer == "a" else "a", round_trip_s=trip_s) for r in records]

    trimmed = [[msgspec.structs.replace(r, links=r.links[:1]) for r in pair_of(trip_s)] for trip_s in (0.3, 1.2)]
    assert told(trimmed[0]) == []
    assert told(trimmed[1]) == ["slow link: a b"]
