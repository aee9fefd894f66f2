"""The time to search is spent on searching: libraries are loaded before, whoever asks for a plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

A_PLAN = """
import sys
import numpy as np
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import ModelShape, NodeView, Snapshot
from bsns.planning.planner import make_plan
nodes = tuple(NodeView(PeerId(name), 0.001, 500) for name in "abc")
shape = ModelShape(ModelId("m"), "m", (100,) * 8, 0, 1000)
before = set(sys.modules)
make_plan(Snapshot(0.0, nodes), shape, cache_tokens=0, rng=np.random.default_rng(0), remaining_s=lambda: 0.1)
print(*(name for name in set(sys.modules) - before if name in ("scipy.optimize", "ortools")))
"""

A_VERB = """
import sys
import time
from bsns.cli import plan
from bsns.cli.main import command
class Watch:
    def monotonic(self):
        print("loaded", "scipy.optimize" in sys.modules, "bsns.planning.planner" in sys.modules)
        return time.monotonic()
plan.time = Watch()
sys.argv = ["bsns", "plan", "shape.json", "--snapshot", "swarm.json", "--deadline", "50ms"]
sys.exit(command())
"""


def said(code: str, folder: Path) -> str:
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_search_loads_no_library(tmp_path: Path) -> None:
    assert said(A_PLAN, tmp_path).strip() == ""


def test_the_verb_counts_the_time_from_when_all_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(
        json.dumps({"name": "m", "block_bytes": 100, "block_count": 8, "hidden_bytes": 1000})
    )
    nodes = [{"peer": name, "block_time_s": 0.001, "memory_bytes": 500} for name in "abc"]
    (tmp_path / "swarm.json").write_text(json.dumps({"nodes": nodes, "links": []}))
    readings = [line for line in said(A_VERB, tmp_path).splitlines() if line.startswith("loaded")]
    assert readings
    assert set(readings) == {"loaded True True"}
