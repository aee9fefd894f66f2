"""Ctrl-C while the exact solver works in a thread: it belongs to the process, not to the solver."""

from __future__ import annotations

import subprocess
import sys

import pytest

SOLVES = {
    "chain": """
from bsns.core.plan import Objective
from bsns.planning.exact import solve_exactly
from bsns.planning.network import chain_problem
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import ModelShape, NodeView, Snapshot
nodes = tuple(NodeView(PeerId(name), 0.001 * (1 + n), 350) for n, name in enumerate("abcdef"))
problem = chain_problem(Snapshot(0.0, nodes), ModelShape(ModelId("m"), "m", (100,) * 8, 0, 1000))
def solve():
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert solve_exactly(problem, Objective(*weights), remaining_s=lambda: 60.0).proven
""",
    "graph": """
import numpy as np
from bsns.planning.graph import Fleet, OperatorGraph
from bsns.planning.partition_model import solve as solve_graph
diamond = np.array([(0, 1), (0, 2), (1, 3), (2, 3)])
graph = OperatorGraph(tuple("abcd"), np.array([3.0, 2.0, 1.0, 2.0]), np.ones(4), diamond)
def solve():
    assert solve_graph(graph, Fleet(2, 3.0), 8.0, np.ones(4, dtype=np.intp), np.full(4, 2)).optimal
""",
}

AROUND = """
import os
import signal
import threading
from ortools.sat.python import cp_model
hits = []
signal.signal(signal.SIGINT, lambda *_: hits.append(1))
solves = []
plain = cp_model.CpSolver.solve
class Asks(cp_model.CpSolverSolutionCallback):
    def on_solution_callback(self):
        os.kill(os.getpid(), signal.SIGINT)  # in the midst of a solve
def asking(solver, model, callback=None):
    solves.append(1)
    return plain(solver, model, callback or Asks())
cp_model.CpSolver.solve = asking
thread = threading.Thread(target=solve)
thread.start()
thread.join()
during = len(hits)
signal.raise_signal(signal.SIGINT)  # and after
print(bool(solves), bool(during), len(hits) > during)
"""


@pytest.mark.parametrize("what", SOLVES)
def test_ctrl_c_reaches_the_process_during_a_solve_and_after_it(what: str) -> None:
    ran = subprocess.run([sys.executable, "-c", SOLVES[what] + AROUND], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["True", "True", "True"], "")
