"""`bsns simulate` at the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from inherited_signals import heeded_signals
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


def test_problems_are_told_and_end_it_with_status_1(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, printed, _ = run(str(tiny), "--json")
    bad = json.loads(printed) | {"problems": ["client 0 at 1.000 s: wrong tokens"]}
    monkeypatch.setattr("bsns.cli.simulate.ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr("bsns.cli.simulate._begin", lambda parent: None)
    monkeypatch.setattr("bsns.cli.simulate._one", lambda text, seed, draw: (bad | {"seed": seed}, b""))
    for options, said in (((), "wrong tokens"), (("--runs", "2"), "problems with seeds 0, 1")):
        code, printed, complained = run(str(tiny), *options)
        assert code == 1
        assert said in " ".join(printed.split())
        assert "error" not in complained
    code, printed, _ = run(str(tiny), "--json")
    assert code == 1
    assert json.loads(printed)["problems"] == bad["problems"]


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


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["ended", "Ctrl-C", "killed"],
)
def test_whoever_ends_it_waits_for_no_run_and_reads_of_none(
    tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    """Ctrl-C reaches every process of the terminal."""
    file = tmp_path / "long.toml"
    file.write_text(TINY.replace("duration_s = 2.0", "duration_s = 86400.0"))
    command = [sys.executable, "-m", "bsns.cli.main", "simulate", str(file), "--runs", "4", "--jobs", "2", "--json"]
    with heeded_signals():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    with process:
        try:
            give_up_s = time.monotonic() + 60.0
            workers: list[psutil.Process] = []
            while len(workers) < 2 and time.monotonic() < give_up_s:
                here = psutil.Process(process.pid).children()
                workers = [child for child in here if child.cpu_times().user > 1.0]  # past its imports
                time.sleep(0.05)
            assert len(workers) == 2
            if signum == signal.SIGINT:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)
            out, err = process.communicate(timeout=10.0)
            assert (process.returncode, out) == (status, b"")
            assert signum == signal.SIGKILL or err == b""  # then Python's own tracker has something to say
            assert psutil.wait_procs(workers, 5.0)[1] == []
        finally:
            process.kill()
