"""Records as a snapshot: who is in it, and which of two measurements of a link counts."""

from __future__ import annotations

from typing import Any

from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.snapshot import snapshot

A, B = PeerId("a"), PeerId("b")


def record(peer: PeerId, **fields: Any) -> NodeRecord:
    usual: dict[str, Any] = {
        "addresses": (),
        "model": ModelId("m"),
        "model_name": "m",
        "block_count": 6,
        "start": 0,
        "end": 6,
        "state": "serving",
        "device": "cpu",
        "dtype": "bfloat16",
        "executor": "torch",
        "threads": 2,
        "cache_tokens": 1000,
        "cache_tokens_left": 400,
        "block_time_s": 0.001,
        "rss_bytes": 0,
        "version": "0",
        "started_s": 40.0,
        "expires_s": 200.0,
    }
    return NodeRecord(**usual | {"peer": peer} | fields)


def test_a_node_as_its_record_shows_it() -> None:
    view = snapshot([record(A, others=((2, 4),), memory_bytes=77, prefill_time_s=0.1, price=2.0)], 100.0).nodes[0]
    assert [str(blocks) for blocks in view.held] == ["0:6", "2:4"]
    assert (view.memory_bytes, view.prefill_time_s, view.price, view.uptime_s) == (77, 0.1, 2.0, 60.0)
    assert (view.serving, view.threads, view.cache_tokens_left) == (True, 2, 400)


def test_the_slower_of_two_measurements_counts() -> None:
    one = record(A, links=(LinkRecord(B, 0.01, 0.001, 1e6, 90.0),))
    other = record(B, links=(LinkRecord(A, 0.02, 0.0005, 2e6, 95.0),))
    assert snapshot([one, other], 100.0).link(A, B) == Link(0.02, 1e6, 0.001, 10.0)
    assert snapshot([one, record(B)], 100.0).link(B, A) == Link(0.01, 1e6, 0.001, 10.0)


def test_links_to_itself_and_to_nodes_that_are_gone_do_not_count() -> None:
    links = (LinkRecord(A, 0.01, 0.0, 1e6, 90.0), LinkRecord(PeerId("c"), 0.01, 0.0, 1e6, 90.0))
    seen = snapshot([record(A, links=links)], 100.0, {A: Link(0.1), B: Link(0.2)})
    assert seen.links == {}
    assert seen.client == {A: Link(0.1)}


def test_a_node_that_was_not_timed_yet_is_not_in() -> None:
    assert snapshot([record(A, block_time_s=0.0), record(B)], 100.0).nodes[0].peer == B
