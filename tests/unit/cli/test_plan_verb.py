"""`bsns plan` on files: what it prints, and what it says of files it cannot use."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bsns.cli import console
from bsns.cli.main import app, command
from bsns.cli.schemas import app as schemas
from bsns.core.snapshot import Snapshot

SHAPE = {"name": "big", "block_bytes": 100, "block_count": 8, "hidden_bytes": 1000, "kv_bytes_per_token_per_block": 0}


def node(peer: str, block_time_s: float = 0.001, memory_bytes: int = 500) -> dict[str, Any]:
    return {"peer": peer, "block_time_s": block_time_s, "memory_bytes": memory_bytes}


def link(a: str, b: str, round_trip_s: float = 0.001) -> dict[str, Any]:
    return {"a": a, "b": b, "round_trip_s": round_trip_s, "bytes_per_s": 1e8}


class Desk:
    """A folder with a shape and a snapshot, and the command as a person types it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self.shape(SHAPE)

    def shape(self, shape: Any) -> None:
        (self.folder / "shape.json").write_text(json.dumps(shape))

    def snapshot(self, nodes: list[dict[str, Any]], links: list[dict[str, Any]]) -> None:
        (self.folder / "swarm.json").write_text(json.dumps({"nodes": nodes, "links": links}))

    def plan(self, *options: str) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        files = [str(self.folder / "shape.json"), "--snapshot", str(self.folder / "swarm.json")]
        self._monkeypatch.setattr("sys.argv", ["bsns", "plan", *files, "--deadline", "1s", *options])
        status = command()
        said = self._capsys.readouterr()
        return status, said.out, said.err


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.delenv("BSNS_INVITE", raising=False)
    monkeypatch.setattr(console, "log_to_stderr", lambda **_: None)  # it is for a process of its own: others log here
    heeded = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield Desk(tmp_path, capsys, monkeypatch)
    for signum, handler in heeded.items():
        signal.signal(signum, handler)


def test_it_is_a_verb() -> None:
    assert "plan" in {command.name for command in app.registered_commands}


def test_a_plan_as_json_adds_up(desk: Desk) -> None:
    desk.snapshot([node("a"), node("b"), node("c", 0.5)], [link("a", "b"), link("b", "c"), link("a", "c")])
    status, out, _ = desk.plan("--json")
    value = json.loads(out)
    assert status == 0
    ranges = [tuple(map(int, stage["range"].split(":"))) for stage in value["stages"]]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 8
    assert value["gap"] == pytest.approx(value["bottleneck_ms"] / value["lower_bound_ms"] - 1)
    assert {"node": "c"}.items() <= value["left_out"][0].items(), "a node of half a second a block would only hurt"
    assert value["left_out"][0]["reason"]


def test_one_node_alone_is_said_to_be_faster_where_it_is(desk: Desk) -> None:
    far = [link("a", "b", 0.1)]
    desk.snapshot([node("a", memory_bytes=10_000), node("b", memory_bytes=10_000)], far)
    status, out, _ = desk.plan("--objective", "latency", "--json")
    assert status == 0
    assert [stage["node"] for stage in json.loads(out)["stages"]] in (["a"], ["b"])


def test_a_file_that_was_named_counts_for_more_than_an_invite_in_the_environment(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.snapshot([node("a"), node("b")], [link("a", "b")])
    monkeypatch.setenv("BSNS_INVITE", "bsns1-of-another-swarm")
    assert desk.plan()[0] == 0
    assert "either --join" in desk.plan("--join", "bsns1-x")[2]


def test_a_picture_and_the_snapshot_can_be_kept(desk: Desk) -> None:
    desk.snapshot([node("a"), node("b")], [link("a", "b")])
    picture, kept = desk.folder / "plan.svg", desk.folder / "kept.json"
    status, out, _ = desk.plan("--svg", str(picture), "--save-snapshot", str(kept))
    assert status == 0
    assert "tokens/s" in out
    assert picture.read_text().startswith("<?xml")
    assert Snapshot.from_json(kept.read_bytes()) == Snapshot.from_json((desk.folder / "swarm.json").read_bytes())


@pytest.mark.parametrize(
    ("nodes", "links", "options", "words"),
    [
        ([], [], (), "no nodes"),
        ([node("a", -1.0)], [], (), "block_time_s is -1.0"),
        ([node("a"), node("b")], [link("a", "b", -0.5)], (), "round_trip_s is -0.5"),
        ([node("a", memory_bytes=10)], [], (), "missing"),
        ([node("a"), node("b", memory_bytes=100)], [], (), "missing"),
        ([node("a"), node("b")], [], ("--objective", "beauty"), "throughput, latency, mixed"),
        ([node("a"), node("b")], [], ("--deadline", "soon"), "not a time"),
        ([node("a"), node("b")], [], ("--svg", "/nowhere/plan.svg"), "cannot be written"),
        ([node("a"), node("b")], [], ("--join", "bsns1-x"), "either --join"),
        ([node("a"), node("b")], [], ("--weights", "latency=1,latency=2"), "latency is given twice"),
        ([node("a"), node("b")], [], ("--weights", "fast", "--schemas", "nope.json"), "either --weights or --schemas"),
        ([node("a") | {"price": 1e308}, node("b")], [], ("--weights", "cheap"), "price is 1e+308"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    desk: Desk, nodes: list[dict[str, Any]], links: list[dict[str, Any]], options: tuple[str, ...], words: str
) -> None:
    desk.snapshot(nodes, links)
    status, out, err = desk.plan(*options)
    assert status == 2
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_the_most_a_node_may_ask_leaves_the_others_as_they_are(desk: Desk) -> None:
    free = [node("a", 0.001, 1000), node("b", 0.002, 1000)]
    desk.snapshot([*free, node("c", 0.001, 1000) | {"price": 1e12}], [link("a", "b"), link("b", "c"), link("a", "c")])
    status, out, err = desk.plan("--weights", "cheap", "--json")
    assert (status, err) == (0, "")
    assert [stage["node"] for stage in json.loads(out)["stages"]] == ["a"]


def test_nodes_with_like_names_are_told_apart(desk: Desk) -> None:
    desk.snapshot([node("aaaaaaaa-office-1"), node("bbbbbbbb-office-1"), node("[/c]", 0.5)], [])
    picture = desk.folder / "plan.svg"
    status, out, _ = desk.plan("--svg", str(picture))
    assert status == 0
    for name in ("…a-office-1", "…b-office-1", "[/c]"):
        assert name in out, name
        assert name in picture.read_text(), name
    assert "…[/c]" not in out


def test_a_seed_is_not_negative(desk: Desk) -> None:
    desk.snapshot([node("a")], [])
    status, _, err = desk.plan("--seed", "-1")
    assert (status, "--seed" in err, "unexpected" in err) == (2, True, False)


def test_a_model_larger_than_the_swarm_says_how_much_is_missing_and_what_would_fit(desk: Desk) -> None:
    gib = 2**30
    desk.shape(SHAPE | {"block_bytes": gib})
    desk.snapshot([node("a", memory_bytes=3 * gib), node("b", memory_bytes=3 * gib)], [link("a", "b")])
    status, _, err = desk.plan()
    assert status == 2
    assert "2 GiB are missing" in err
    assert "int8" in err


def test_schemas_for_another_objective_or_model_are_told_of(desk: Desk) -> None:
    desk.snapshot([node("a"), node("b")], [link("a", "b")])
    library, swarm = desk.folder / "schemas.json", desk.folder / "swarm.json"
    built = CliRunner().invoke(
        schemas, ["build", str(desk.folder / "shape.json"), "--topologies", str(swarm), "--out", str(library)]
    )
    assert built.exit_code == 0
    assert desk.plan("--schemas", str(library))[2] == ""
    status, out, err = desk.plan("--schemas", str(library), "--objective", "latency")
    assert (status, "schemas" in out) == (0, True)
    assert "planned for throughput, not for latency" in err
    desk.shape(SHAPE | {"block_count": 5})
    status, _, err = desk.plan("--schemas", str(library))
    assert (status, "built for big with 8 blocks, but big, which is to be planned, has 5 blocks" in err) == (2, True)


def test_missing_files_and_shapes_are_one_line(desk: Desk) -> None:
    status, _, err = desk.plan()
    assert (status, "cannot be read" in err) == (2, True)
    desk.snapshot([node("a")], [])
    desk.shape({"name": "x"})
    status, _, err = desk.plan()
    assert (status, "not a model's shape" in err) == (2, True)
