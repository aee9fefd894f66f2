"""A plan in words: what people and programs are told of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from bsns.cli import console, tables
from bsns.cli.console import parse_seconds
from bsns.cli.plan_picture import draw_plan
from bsns.cli.plan_table import as_dict, footprints, show
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import ONE_NODE, Alternative, LeftOut, Objective, Plan, PlannedStage
from bsns.core.snapshot import Link, ModelShape, NodeView, Snapshot, pair
from bsns.planning.account import advice, found_by

PEERS = [PeerId(f"12D3KooWnode{n:04d}") for n in range(4)]
SHAPE = ModelShape(ModelId("m"), "m", (100,) * 4, 1, 1000)
SNAPSHOT = Snapshot(
    0.0,
    tuple(NodeView(peer, 0.001 * (n + 1), 1000, held=(BlockRange(0, 2),)) for n, peer in enumerate(PEERS)),
    {pair(PEERS[0], PEERS[1]): Link(0.01, 1e6), pair(PEERS[1], PEERS[2]): Link(0.02, 1e6)},
)
PLAN = Plan(
    ModelId("m"),
    "m",
    4,
    Objective(),
    (
        PlannedStage(BlockRange(0, 3), PEERS[0], 0.003, 0.001, (PEERS[2],)),
        PlannedStage(BlockRange(3, 4), PEERS[1], 0.002, 0.006),
    ),
    (LeftOut(PEERS[3], "it is too slow"),),
    bottleneck_s=0.008,
    latency_s=0.0125,
    lower_bound_s=0.0064,
    gap=0.25,
    method="brkga",
    alternatives=(
        Alternative("equal split", 0.016, 0.02),
        Alternative(ONE_NODE, 0.004, 0.004),
        Alternative("memory-proportional", None, None, "breaks a node's memory"),
    ),
    assumptions=("4 links were not measured",),
)


def test_people_are_told_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    show(PLAN, SNAPSHOT, None, footprints(PLAN, SNAPSHOT, SHAPE, 7))
    said = capsys.readouterr().out
    for words in (
        "80.0 tokens/s with one stream",
        "160.0 with 2",
        "at most 25.0% from the best possible",
        "2.00 × the cost",
        "breaks a node's memory",
        "it is too slow",
        "one node alone would answer a single stream faster: 250.0 tokens/s against 80.0",
        "assumed: 4 links were not measured",
        "…node0002",
        "memory once all of the cache is used",
        "7.15 KiB",
    ):
        assert words in said, words


def test_no_figure_is_broken_at_eighty_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "out", Console(width=80, soft_wrap=True, force_terminal=True, color_system=None))
    show(PLAN, SNAPSHOT, None, footprints(PLAN, SNAPSHOT, SHAPE, 7))
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("memory once"))
    assert lines[at + 1].split() == ["blocks", "node", "precision", "process", "weights", "cache", "in", "all", "now"]
    assert [line.split()[1] for line in lines[at + 3 : at + 6]] == ["…node0000", "…node0002", "…node0001"]
    assert max(map(len, lines[: at + 6])) <= 80


def test_a_proven_plan_says_that_none_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    show(dataclasses.replace(PLAN, gap=0.0), SNAPSHOT, None, [])
    assert "no plan can be better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dynamic programming", "found by dynamic programming"),
        ("joining (Petals) + replicas", "found by joining (Petals) + replicas"),
        ("by speed (Parallax) + replicas", "found by speed (Parallax) + replicas"),
    ],
)
def test_how_a_plan_was_found(method: str, words: str) -> None:
    assert found_by(method) == words


def test_programs_are_told_the_same() -> None:
    value = json.loads(json.dumps(as_dict(PLAN, None, footprints(PLAN, SNAPSHOT, SHAPE, 7))))
    assert value["stages"][0]["range"] == "0:3"
    assert value["stages"][0]["replicas"] == [PEERS[2]]
    assert value["tokens_per_s"] == {"1": pytest.approx(80), "2": pytest.approx(160)}
    assert value["alternatives"][2] == {
        "name": "memory-proportional",
        "bottleneck_ms": None,
        "latency_ms": None,
        "note": "breaks a node's memory",
    }


def test_no_advice_where_one_node_is_no_faster_or_cannot_hold_it() -> None:
    slower = (Alternative(ONE_NODE, 0.02, 0.02),)
    impossible = (Alternative(ONE_NODE, None, None, "it does not fit"),)
    assert advice(dataclasses.replace(PLAN, alternatives=slower)) == []
    assert advice(dataclasses.replace(PLAN, alternatives=impossible)) == []
    assert advice(dataclasses.replace(PLAN, stages=PLAN.stages[:1])) == []


def test_equal_plans_give_equal_pictures(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("one.svg", "two.svg"):
        draw_plan(PLAN, SNAPSHOT, SHAPE, folder / name)
    drawn = (folder / "one.svg").read_text()
    assert drawn == (folder / "two.svg").read_text()
    assert "0:3" in drawn
    assert "80.0 tokens/s" in drawn


@pytest.mark.parametrize(("text", "seconds"), [("2s", 2.0), ("500ms", 0.5), ("1.5", 1.5), ("1m", 60.0), (".5 s", 0.5)])
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1s", "0", "2h", "nan", "1e9", "100000"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(BadOption):
        parse_seconds(text)
