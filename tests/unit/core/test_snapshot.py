"""Snapshots: the same after a walk through a file, and clear about what is wrong in one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadSnapshot
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, ModelShape, NodeView, Snapshot, check_shape, pair, slower

A, B = PeerId("a"), PeerId("b")


def file(**changes: Any) -> bytes:
    """A good snapshot file of two nodes, with some of it changed."""
    good: dict[str, Any] = {
        "nodes": [
            {"peer": "a", "block_time_s": 0.001, "memory_bytes": 10},
            {"peer": "b", "block_time_s": 0.002, "memory_bytes": 20, "held": ["0:4"]},
        ],
        "links": [{"a": "a", "b": "b", "round_trip_s": 0.01, "bytes_per_s": 1e6}],
    }
    return json.dumps(good | changes).encode()


def with_node(**changes: Any) -> bytes:
    return file(nodes=[{"peer": "a", "block_time_s": 0.001, "memory_bytes": 10} | changes], links=[])


def with_link(**changes: Any) -> bytes:
    return file(links=[{"a": "a", "b": "b", "round_trip_s": 0.01} | changes])


def test_a_file_gives_what_it_says() -> None:
    snapshot = Snapshot.from_json(file())
    assert snapshot.node(B) == NodeView(B, 0.002, 20, held=(BlockRange(0, 4),))
    assert snapshot.link(B, A) == snapshot.link(A, B) == Link(0.01, 1e6)
    assert snapshot.node(PeerId("c")) is None


def test_it_is_the_same_after_a_walk_through_a_file() -> None:
    nodes = (
        NodeView(A, 0.001, 10, 0.0001, held=(BlockRange(0, 2), BlockRange(4, 5)), price=2.0),
        NodeView(B, 0.5, 9, quant="int8", resident_bytes=5),
    )
    links = {pair(B, A): Link(0.01, math.inf, 0.001, 3.0)}
    snapshot = Snapshot(7.0, nodes, links, {B: Link(0.02, 5.0)})
    assert Snapshot.from_json(snapshot.to_json()) == snapshot


def test_a_link_that_differs_by_direction_counts_as_the_slower_and_says_so() -> None:
    both = [
        {"a": "a", "b": "b", "round_trip_s": 0.01, "bytes_per_s": 1e6},
        {"a": "b", "b": "a", "round_trip_s": 0.03, "bytes_per_s": 2e6},
    ]
    snapshot = Snapshot.from_json(file(links=both))
    assert snapshot.link(A, B) == Link(0.03, 1e6)
    assert "given twice" in snapshot.assumptions[0]
    assert Snapshot.from_json(file(links=[both[0], both[0]])).assumptions == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not a snapshot"),
        (b"[" * 100_000, "not a snapshot"),
        (b"\xff\xfe", "not a snapshot"),
        (file(version=2), "version 2"),
        (file(extra=1), "extra"),
        (file(nodes=[{"peer": "a"}], links=[]), "block_time_s"),
        (with_node(block_time_s=-1.0), "block_time_s is -1.0"),
        (with_node(block_time_s=0.0), "block_time_s is 0"),
        (with_node(memory_bytes=-5), "memory_bytes is -5"),
        (with_node(memory_bytes=0.5), "node a: memory_bytes is 0.5, which is no whole number"),
        (with_node(block_time_s=1e300), "block_time_s"),
        (with_node(reputation=-0.1), "reputation"),
        (with_node(reputation=1.1), "reputation is 1.1"),
        (with_node(price=1e308), "price is 1e"),
        (with_node(cache_tokens=5, cache_tokens_left=-7), "cache_tokens_left is -7"),
        (with_node(cache_tokens=5, cache_tokens_left=6), "cache_tokens_left is 6"),
        (with_node(peer=""), "peer id"),
        (with_node(peer="client"), "peer id"),
        (with_node(held=["3:1"]), "held"),
        (file(nodes=[{"peer": "a", "block_time_s": 1.0, "memory_bytes": 1}] * 2, links=[]), "same peer id"),
        (with_link(round_trip_s=-0.1), "round_trip_s is -0.1"),
        (with_link(bytes_per_s=0), "bytes_per_s is 0"),
        (with_link(bytes_per_s=1e-308), "bytes_per_s is 1e-308"),
        (with_node(block_time_s=1e-310), "block_time_s is 1e-310"),
        (with_link(spread_s=-1), "spread_s"),
        (with_link(b="c"), "does not lie between"),
        (with_link(b="a"), "does not lie between"),
        (with_link(round_trip_s=1e300), "round_trip_s"),
    ],
)
def test_a_bad_file_says_what_is_wrong(text: bytes, words: str) -> None:
    with pytest.raises(BadSnapshot, match=words):
        Snapshot.from_json(text)


def test_a_transfer_is_half_the_round_trip_and_the_bytes() -> None:
    assert Link(0.01, 1e6).transfer_s(1000) == pytest.approx(0.006)
    assert Link(0.01).transfer_s(1e12) == 0.005


def test_the_slower_of_two_takes_the_worse_of_each() -> None:
    assert slower(Link(1.0, 5.0, 0.1, 9.0), Link(2.0, 7.0, 0.05, 1.0)) == Link(2.0, 5.0, 0.1, 9.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_bytes": ()}, "no blocks"),
        ({"block_work": (1.0,)}, "work for 1"),
        ({"block_work": (1.0, math.nan)}, "no number"),
        ({"block_work": (1.0, 0.0)}, "no number"),
        ({"block_bytes": (1, -1)}, "negative"),
        ({"hidden_bytes": -1}, "negative"),
    ],
)
def test_a_bad_shape_says_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {
        "model": ModelId("m"),
        "name": "m",
        "block_bytes": (5, 5),
        "kv_bytes_per_token_per_block": 1,
        "hidden_bytes": 2,
    }
    check_shape(ModelShape(**good))
    with pytest.raises(BadSnapshot, match=words):
        check_shape(ModelShape(**good | changes))


def test_a_shape_from_a_file() -> None:
    equal = b'{"name": "big", "block_bytes": 7, "block_count": 3, "hidden_bytes": 2}'
    assert ModelShape.from_json(equal) == ModelShape(ModelId("big"), "big", (7, 7, 7), 0, 2)
    whole = b'{"name": "big", "block_bytes": 7e9, "block_count": 1, "hidden_bytes": 2.0}'
    assert ModelShape.from_json(whole) == ModelShape(ModelId("big"), "big", (7_000_000_000,), 0, 2)
    own = b'{"name": "big", "block_bytes": [1, 2], "hidden_bytes": 2, "block_work": [0.5, 1.5], "model": "id"}'
    assert ModelShape.from_json(own) == ModelShape(ModelId("id"), "big", (1, 2), 0, 2, (0.5, 1.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_count": None}, "give block_count too"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 1_000_000}, "block_count is 1000000"),
        ({"block_bytes": []}, "lists 0 blocks"),
        ({"block_bytes": [], "block_count": None}, "no blocks"),
        ({"block_bytes": [7, 7, 7]}, "block_count is 2, but block_bytes lists 3 blocks"),
        ({"block_bytes": [7, 7.5]}, "block_bytes is 7.5, which is no whole number"),
        ({"hidden_bytes": -2}, "negative"),
        ({"hidden_bytes": 1e300}, "a size"),
        ({"name": ""}, "cannot be a model's name"),
        ({"name": "\x1b[31mred"}, "cannot be a model's name"),
        ({"name": "m\u202e"}, "cannot be a model's name"),
        ({"model": "\n"}, "cannot be a model's name"),
        ({"dtype": "float17"}, "dtype is 'float17'; use one of float32"),
    ],
)
def test_a_bad_shape_file_says_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    good = {"name": "x", "block_bytes": 7, "block_count": 2, "hidden_bytes": 2}
    ModelShape.from_json(json.dumps(good).encode())
    with pytest.raises(BadSnapshot, match=words):
        ModelShape.from_json(json.dumps(good | changes).encode())


def test_what_is_no_shape_file() -> None:
    with pytest.raises(BadSnapshot, match="not a model's shape"):
        ModelShape.from_json(b"no")
