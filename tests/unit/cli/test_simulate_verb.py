"""`bsns simulate` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bsns.cli.main import app

TINY = """
duration_s = 2.0
[model]
blocks = 4
[[nodes]]
count = 2
[clients]
prompt_tokens = [4, 4]
answer_tokens = [4, 4]
"""


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def test_figures_and_a_picture(tiny: Path, tmp_path: Path) -> None:
    code, printed, _ = run(str(tiny), "--json", "--plot", str(tmp_path / "run.svg"), "--seed", "3")
    assert code == 0
    figures = json.loads(printed)
    assert figures["seed"] == 3
    assert figures["answers"] == figures["whole"] == figures["compared"] > 0
    assert figures["problems"] == []
    assert (tmp_path / "run.svg").read_bytes().startswith(b"<?xml")


def test_several_runs(tiny: Path) -> None:
    code, printed, _ = run(str(tiny), "--runs", "3", "--jobs", "2")
    assert code == 0
    assert "3 runs" in printed
    assert "no problems" in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [("nonsense", "no scenario"), (TINY.replace("count = 2", "count = 0"), "1 to 20000 nodes")],
)
def test_a_scenario_that_cannot_be_is_one_line(tiny: Path, text: str, said: str) -> None:
    tiny.write_text(text)
    code, _, complained = run(str(tiny))
    assert code == 2
    assert said in " ".join(complained.split())
    assert "Traceback" not in complained


def test_files_and_options_that_make_no_sense(tiny: Path, tmp_path: Path) -> None:
    assert run(str(tmp_path / "none.toml"))[0] == 2
    assert run(str(tiny), "--runs", "2", "--plot", "x.svg")[0] == 2
