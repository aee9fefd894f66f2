"""An emulated network on this machine: real namespaces, real TUN devices, and a real swarm of throttled nodes in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import running, tiny, until

from bsns.bench.emulation import NAMESPACES, Network, Way, hindrance, measure, remove_stale

__all__ = ["tiny"]

pytestmark = pytest.mark.skipif(hindrance() is not None, reason=hindrance() or "")


def places() -> set[str]:
    return {path.name for path in NAMESPACES.iterdir()} if NAMESPACES.is_dir() else set()


def own_places() -> set[str]:
    return {name for name in places() if name.startswith(f"bsns-{os.getpid()}-")}


def test_ways_delay_and_pace_as_asked() -> None:
    with Network(3) as network:
        assert len(own_places()) == 3
        slow, fast = Way(0.020, 2.5e6), Way(0.001, 125e6)
        network.shape({(0, 1): slow, (1, 0): slow, (0, 2): slow, (2, 0): fast})
        there_and_back = measure(network, 0, 1, echoes=3, bulk_bytes=200_000)
        assert there_and_back.delay_s >= 0.020  # a busy machine adds to it and takes nothing away
        took_s = 200_000 / there_and_back.bytes_per_s + 2 * there_and_back.delay_s
        assert took_s >= 200_000 / 2.5e6 + 0.040
        assert measure(network, 0, 2, echoes=3, bulk_bytes=1000).delay_s >= 0.0105  # half of there and back
        counts = network.counts()
        assert counts.packets > 10
        assert counts.dropped == 0
    assert own_places() == set()


def test_what_a_lossy_way_loses_comes_again() -> None:
    with Network(2) as network:
        lossy = Way(0.001, 12.5e6, loss=0.05)
        network.shape({(0, 1): lossy, (1, 0): lossy})
        assert measure(network, 0, 1, echoes=40).bytes_per_s > 0
        assert network.counts().dropped > 0


def test_a_killed_owner_leaves_only_what_the_next_one_removes() -> None:
    code = (
        "import os\nfrom bsns.bench.emulation import Network\n"
        "with Network(2): print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    left = {f"bsns-{pid}-0", f"bsns-{pid}-1"}
    assert left <= places()
    assert left <= set(remove_stale())
    assert not left & places()


def marked(mark: str) -> list[psutil.Process]:
    """Living processes that began with this word in their environment: all that a command has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("MARK") == mark:
                found.append(process)
    return found


BENCH = ("bench", "swarm", "--settings", "1", "--quick", "--json")


def test_a_swarm_of_throttled_nodes(tiny: str) -> None:
    mark = secrets.token_hex(8)
    with running(*BENCH, tiny, env={"MARK": mark}) as command:
        done = command.finish(240.0)
        assert done.returncode == 0, done.stderr
        until(lambda: not marked(mark), 10.0, "the end of all its processes")
        assert not [name for name in places() if name.startswith(f"bsns-{command.pid}-")]
    figures = json.loads(done.stdout)
    (row,) = figures["settings"]
    for asked_ms, found_ms in zip(row["asked_block_time_ms"], row["block_time_ms"], strict=True):
        assert found_ms >= asked_ms * 0.999  # it slept, and calibration saw it
    for objective in ("latency", "throughput"):
        assert {name: row[objective][name]["measured"] > 0 for name in ("equal", "planned")} == {
            "equal": True,
            "planned": True,
        }
        assert row[objective]["predicted_gain"] > -0.01  # the equal split is among what the planner may choose
        assert figures["summary"][objective]["median_error"] >= 0
    assert row["assumptions"] == []  # every link was measured
    assert figures["network"]["packets"] > 100


def test_a_killed_bench_leaves_no_process(tiny: str) -> None:
    mark = secrets.token_hex(8)
    with running(*BENCH, tiny, env={"MARK": mark}) as command:
        until(lambda: len(marked(mark)) >= 5, 120.0, "the start of its nodes")
        command.signal(signal.SIGKILL)
        until(lambda: not marked(mark), 15.0, "the end of all its processes")
    until(lambda: not Path("/proc", str(command.pid)).exists(), 5.0, "its own end")
    remove_stale()
    assert not [name for name in places() if name.startswith(f"bsns-{command.pid}-")]


def test_without_root_it_says_what_it_needs() -> None:
    code = "import os; from bsns.bench.emulation import hindrance; os.setuid(65534); print(hindrance())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "use sudo" in done.stdout, done
