"""What `up` and `status` make of what nodes say."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from bsns.cli import status, tables, up
from bsns.client.pieces import Stats
from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId
from bsns.core.memory import MemoryUse
from bsns.node.view import NodeStatus
from bsns.protocol.inference import Description, Passed
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Hop


def node(
    peer: str, start: int, end: int, *, state: str = "serving", error: str | None = None, model: str = "m"
) -> NodeStatus:
    record = NodeRecord(
        peer=PeerId(peer),
        addresses=(),
        model=ModelId(f"id of {model}"),
        model_name=model,
        block_count=8,
        start=start,
        end=end,
        state=state,
        device="cpu",
        dtype="float32",
        executor="torch",
        threads=1,
        cache_tokens=100,
        cache_tokens_left=90,
        block_time_s=0.001,
        rss_bytes=5_000_000,
        version="0",
        started_s=0.0,
        expires_s=0.0,
    )
    now = None if error else Description(start, end, 2, 100, 40, 0.002, 6_000_000, 1, 1)
    return NodeStatus(record, now, None if error else 0.003, error)


def shown(view: object) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def test_missing_ranges_are_those_that_nobody_serves_now() -> None:
    nodes = [node("a", 0, 2), node("b", 2, 4, state="joining"), node("c", 4, 6, error="gone"), node("d", 6, 8)]
    assert status.missing(nodes) == {"m": ["2:6"]}
    assert status.missing([node("a", 0, 8)]) == {}
    assert status.missing([node("a", 0, 8), node("b", 0, 4, model="other")]) == {"other": ["4:8"]}


def test_the_call_for_a_node_names_the_model() -> None:
    assert status.calls([node("a", 0, 2, model="my model")]) == [
        "nobody serves blocks 2:8 of my model; start a node with: bsns serve 'my model' --blocks 2:8 --join INVITE"
    ]


def test_nodes_come_in_the_order_of_their_blocks() -> None:
    nodes = [node("a", 4, 8), node("b", 0, 4), node("c", 0, 2)]
    assert [n.record.peer for n in up.in_block_order(nodes)] == ["c", "b", "a"]


def test_a_node_as_json_has_fresh_numbers_if_it_answers() -> None:
    fresh, stale = status.as_dict(node("a", 0, 8)), status.as_dict(node("a", 0, 8, error="no answer"))
    assert (fresh["cache_tokens_left"], fresh["sessions"], fresh["round_trip_ms"]) == (40, 2, 3.0)
    assert (stale["cache_tokens_left"], stale["sessions"], stale["error"]) == (90, None, "no answer")


def test_what_nodes_announce_is_shown_as_it_is() -> None:
    """A device or a model called [/x] is bad markup, but a fine name."""
    odd = node("a", 0, 8, model="[/m]")
    odd = replace(odd, record=msgspec.structs.replace(odd.record, device="[/x]"))
    for view in (status.table([odd]), status.table([odd, node("b", 0, 8)]), up.table(Stats(), [odd])):
        assert "[/x]" in shown(view)
    assert "[/m], 8 blocks" in shown(status.table([odd]))
    assert "[/m]" in shown(status.table([odd, node("b", 0, 8)]))


def test_memory_that_a_node_makes_up_is_shown_as_it_is() -> None:
    liar = node("a", 0, 8)
    assert liar.now is not None
    made_up = MemoryUse(-(2**63), 2**63 - 1, -1, 0, 2**63 - 1)
    lying = replace(liar, now=msgspec.structs.replace(liar.now, memory=made_up, rss_bytes=-1))
    silent = node("b", 0, 8, error="no answer")
    assert "8 EiB" in shown(status.memory_table([lying, silent]))
    assert status.as_dict(lying)["memory"]["resident_bytes"] == -1
    assert status.as_dict(silent)["memory"] is None


def test_the_status_table_names_the_model_once_or_in_each_row() -> None:
    assert "m, 8 blocks" in shown(status.table([node("a", 0, 8)]))
    two = shown(status.table([node("a", 0, 8), node("b", 0, 8, model="other", error="x")]))
    assert "other" in two
    assert "0:8 no answer" in two
    assert "0:8 joining" in shown(status.table([node("a", 0, 8, state="joining")]))


def test_the_precision_is_in_the_title_or_in_each_row() -> None:
    one, other = node("a", 0, 4), node("b", 4, 8)
    assert re.match("m, 8 blocks, float32 *\n", shown(status.table([one, other])))
    other = replace(other, record=msgspec.structs.replace(other.record, quant="int8"))
    mixed = shown(status.table([one, other]))
    assert re.match("m, 8 blocks *\n", mixed)
    assert "cpu torch, float32, weights int8" in mixed


def printed(monkeypatch: pytest.MonkeyPatch, view: Table, width: int, *, terminal: bool) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, soft_wrap=True, color_system=None)
    monkeypatch.setattr(tables, "out", console)
    tables.print_table(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", [50, 80, 140])
def test_the_tables_of_a_swarm_are_whole_at_eighty_characters(
    monkeypatch: pytest.MonkeyPatch, width: int, terminal: bool
) -> None:
    use = MemoryUse(404_000_000, 105_000_000, 16_000_000, 15_000, 500_000_000)
    nodes = [node(f"12D3KooWsomething{n:08}", 4 * n, 4 * n + 4) for n in range(2)]
    nodes = [replace(n, record=msgspec.structs.replace(n.record, cache_tokens=65536)) for n in nodes]
    nodes = [replace(n, now=msgspec.structs.replace(n.now, memory=use, cache_tokens_left=65536)) for n in nodes]
    for view in (status.table(nodes), status.memory_table(nodes)):
        lines = printed(monkeypatch, view, width, terminal=terminal)
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        assert "…" not in text.replace("…00000000", "").replace("…00000001", "")
        rows = [line for line in lines if line.startswith("…0000000")]
        assert len(rows) == 2
    assert {"385 MiB", "100 MiB", "15.3 MiB", "14.6 KiB"} <= set(re.split(" {2,}", rows[0]))


def test_elsewhere_than_on_a_terminal_each_row_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    view = tables.table("node", "why", broken=("why",))
    view.add_row("a", "word " * 40 + "end")
    assert len(printed(monkeypatch, view, 80, terminal=True)) > 3
    assert len(printed(monkeypatch, view, 80, terminal=False)) == 3


def test_an_answer_as_json() -> None:
    stats = Stats(prompt_tokens=3, tokens=3, ttft_ms=5.0, decode_s=0.5)
    stats.route = (
        Hop(PeerId("a"), BlockRange(0, 4), ()),
        Hop(PeerId("b"), BlockRange(4, 8), ()),
    )
    stats.turns_ms = [
        (9.0, (Passed(1.0, 1.0, 1), Passed(1.0, 1.0, 1))),
        *[(4.0, (Passed(1.5, 1.0, 1), Passed(1.7, 1.2, 1)))] * 2,
    ]
    nodes = [node("a", 0, 4), node("b", 4, 8)]
    report = up.report("text", "stop", stats, nodes)
    assert report["tokens_per_s"] == 4.0
    assert report["hops_ms"] == [
        {"node": "a", "range": "0:4", "compute": 1.0, "inside": 1.5},
        {"node": "b", "range": "4:8", "compute": 1.2, "inside": 1.7},
    ]
    assert [n["rss_mb"] for n in report["nodes"]] == [6.0, 6.0]
    assert "1.20 ms" in shown(up.table(stats, nodes))
    assert "–" in shown(up.table(Stats(), nodes))


def test_the_table_names_the_executor_and_a_line_below_it_the_reason() -> None:
    told = "torch: rope type longrope"
    one, other = node("a", 0, 4), node("b", 4, 8)
    other = replace(other, record=msgspec.structs.replace(other.record, executor=told))
    assert "cpu torch" in shown(status.table([one, other]))
    assert "longrope" not in shown(status.table([one, other]))
    assert status.reasons([one, other]) == ["b computes with torch: rope type longrope"]
    assert status.as_dict(other)["executor"] == told
