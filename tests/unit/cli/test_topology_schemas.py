"""`bsns topology` and `bsns schemas`: what they take, what they say, and what they refuse."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bsns.cli.schemas import app as schemas
from bsns.cli.schemas import drawn as random_swarms
from bsns.cli.schemas import read_swarms
from bsns.cli.topology import drawn, topology
from bsns.core.errors import BadOption, BadSnapshot
from bsns.core.ids import ModelId
from bsns.core.snapshot import ModelShape, Snapshot

app = typer.Typer()
app.command()(topology)


def run(what, *arguments):
    return CliRunner().invoke(what, [str(argument) for argument in arguments])


def test_clusters_are_told_in_words_and_drawn(tmp_path):
    picture = tmp_path / "shape.svg"
    ended = run(app, "--synthetic", "lan_wan:24:4", "--svg", picture)
    assert ended.exit_code == 0, ended.output
    assert "clusters: steps of up to" in ended.output
    assert picture.read_bytes().startswith(b"<?xml")


def test_a_snapshot_file_as_json(tmp_path):
    file = tmp_path / "swarm.json"
    file.write_bytes(drawn("uniform:7:1").to_json())
    ended = run(app, "--snapshot", file, "--json")
    told = json.loads(ended.stdout)
    assert told["nodes"] == 7
    assert [point[1] for point in told["diagrams_ms"]["plain"]["h0"]].count(None) == 1


def test_a_random_swarm_can_be_kept(tmp_path):
    file = tmp_path / "office.json"
    assert run(app, "--synthetic", "lan_wan:6:3", "--save-snapshot", file).exit_code == 0
    assert Snapshot.from_json(file.read_bytes()) == drawn("lan_wan:6:3")
    assert run(app, "--synthetic", "uniform:3", "--save-snapshot", tmp_path / "no" / "where").exit_code == 2


def test_what_was_named_counts_for_more_than_an_invite_in_the_environment(monkeypatch):
    monkeypatch.setenv("BSNS_INVITE", "bsns1-of-another-swarm")
    assert run(app, "--synthetic", "uniform:3").exit_code == 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_smallest_swarms(nodes):
    assert run(app, "--synthetic", f"uniform:{nodes}").exit_code == 0


@pytest.mark.parametrize(
    "text", ["mesh:3:1", "uniform", "uniform:x:1", "uniform:0:1", "uniform:99999999:1", "uniform:3:-1"]
)
def test_no_such_random_swarm(text):
    with pytest.raises(BadOption):
        drawn(text)


@pytest.mark.parametrize(
    "arguments", [[], ["--synthetic", "uniform:3", "--snapshot", "x"], ["--snapshot", "/no/where"]]
)
def test_what_cannot_be_looked_at(arguments):
    ended = run(app, *arguments)
    assert ended.exit_code == 2
    assert "Traceback" not in ended.output


def test_schemas_are_built_and_shown(tmp_path):
    shape, file = tmp_path / "shape.json", tmp_path / "schemas.json"
    shape.write_text(json.dumps({"name": "toy", "block_bytes": 10**9, "block_count": 8, "hidden_bytes": 4096}))
    built = run(schemas, "build", shape, "--count", 3, "--deadline", "1ms", "--out", file, "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["bytes"] == file.stat().st_size
    shown = run(schemas, "show", file)
    assert "toy, 8 blocks, 3 schemas, planned for throughput" in shown.output
    swarms = tmp_path / "swarms.json"
    swarms.write_bytes(b"[" + b",".join(drawn(f"uniform:6:{seed}").to_json() for seed in range(2)) + b"]")
    again = run(schemas, "build", shape, "--topologies", swarms, "--deadline", "1ms", "--out", file, "--json")
    assert len(json.loads(again.stdout)["schemas"]) == 2
    assert run(schemas, "show", shape).exit_code == 2


def test_a_library_without_a_schema_is_not_written(tmp_path):
    shape, swarm, file = tmp_path / "shape.json", tmp_path / "swarm.json", tmp_path / "schemas.json"
    shape.write_text(json.dumps({"name": "toy", "block_bytes": 10**9, "block_count": 8, "hidden_bytes": 4096}))
    swarm.write_text(json.dumps({"nodes": [{"peer": "a", "block_time_s": 0.001, "memory_bytes": 90}], "links": []}))
    built = run(schemas, "build", shape, "--topologies", swarm, "--out", file)
    assert built.exit_code == 2
    assert "toy does not fit the swarm" in built.output
    assert not file.exists()


def test_lists_of_snapshots():
    one = drawn("uniform:3:1").to_json()
    assert len(read_swarms(one)) == 1
    assert len(read_swarms(b"[" + one + b"," + one + b"]")) == 2
    for text in (b"", b"[]", b"[1]", b"[{]", b"[" * 100_000, b"\xff"):
        with pytest.raises(BadSnapshot):
            read_swarms(text)


def test_random_swarms_are_of_every_kind_and_size():
    swarms = random_swarms(30, ModelShape(ModelId("m"), "m", (10**9,) * 8, 0, 4096), np.random.default_rng(0))
    sizes = [len(swarm.nodes) for swarm in swarms]
    assert 4 <= min(sizes) < 10 < 40 < max(sizes) <= 64
