"""What `bsns doctor` prints of what it has seen."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from bsns.cli import doctor, tables
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link
from bsns.node.snapshots import Sight
from bsns.protocol.inference import Description
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.doctor import Finding
from bsns.swarm.snapshot import snapshot

NOW_S = 1_800_000_000.0
IDS = [PeerId(f"12D3KooWsomething{n:08}") for n in range(9)]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no cell is broken."""
    set_width(monkeypatch, 160)


def set_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    for module in (doctor, tables):
        terminal = Console(width=width, soft_wrap=True, force_terminal=True, color_system=None)
        monkeypatch.setattr(module, "out", terminal)


def sight_of(count: int) -> Sight:
    records = tuple(
        NodeRecord(
            peer=peer,
            addresses=(),
            model=ModelId("m"),
            model_name="a-model",
            block_count=count,
            start=n,
            end=n + 1,
            state="serving",
            device="[red]cpu",
            dtype="bfloat16",
            executor="torch",
            threads=2,
            cache_tokens=10_000,
            cache_tokens_left=9_000,
            block_time_s=0.00123,
            rss_bytes=1,
            version="0",
            started_s=NOW_S - 7300,
            expires_s=NOW_S + 60,
            prefill_time_s=0.0001,
            memory_bytes=3 * 2**29,
            links=tuple(LinkRecord(other, 0.0021, 0.0002, 12.5e6, NOW_S - 7) for other in IDS[:n]),
        )
        for n, peer in enumerate(IDS[:count])
    )
    now = Description(0, 1, 3, 10_000, 8_000, 0.00456, 1, 1, 1)
    client = {IDS[0]: Link(0.03, 1e6, 0.001, 0.0)}
    return Sight(records, snapshot(records, NOW_S, client), {IDS[0]: now}, {IDS[1]: "gone"})


def test_nodes_links_and_findings_as_people_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(sight_of(3), [Finding("slow link", "the link is [slow]", (), grave=True)])
    said = capsys.readouterr().out
    for words in (
        "…00000000",
        "3 blocks, bfloat16",
        "0:1",
        "no answer",
        "[red]cpu ×2",
        "4.56 ms",
        "1.23 ms",
        "0.1 ms",
        "1.5 GiB",
    ):
        assert words in said, words
    for words in ("8000", "2 h", "2.10 ± 0.20 ms", "12.5 MB/s", "7 s ago", "30.0 ± 1.0 ms", "not measured"):
        assert words in said, words
    assert "What looks wrong:\n- the link is [slow]" in said


def test_many_nodes_have_their_links_in_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(sight_of(9), [])
    said = capsys.readouterr().out
    assert "37 links, the 30 slowest" in said
    assert said.index("this machine") < said.rindex("…00000008")
    assert "Nothing looks wrong." in said


@pytest.mark.parametrize("nodes", [2, 6])
def test_eighty_characters_are_enough(
    nodes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_width(monkeypatch, 80)
    doctor.show(sight_of(nodes), [])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for header in ("block", "prompt", "memory", "sessions", "…00000001"):
        assert header in said, header
    for line in said.splitlines():
        assert not line.replace("…0000000", "").count("…"), line
    assert ("16 links" in said) == (nodes == 6), "a matrix that does not fit is told as a list"


def test_as_programs_read_it() -> None:
    value = json.loads(json.dumps(doctor.as_dict(sight_of(2), [Finding("clock", "late", (IDS[0],))])))
    assert [node["id"] for node in value["nodes"]] == IDS[:2]
    assert value["nodes"][0] | {"block_time_ms": 4.56, "prefill_time_ms": 0.1, "sessions": 3} == value["nodes"][0]
    assert value["nodes"][1]["error"] == "gone"
    assert value["links"][0] == {
        "a": IDS[0],
        "b": IDS[1],
        "round_trip_ms": 2.1,
        "spread_ms": 0.2,
        "mb_per_s": 12.5,
        "age_s": 7.0,
    }
    assert value["links"][1]["a"] == "client"
    assert value["findings"] == [{"kind": "clock", "grave": False, "peers": [IDS[0]], "text": "late"}]
