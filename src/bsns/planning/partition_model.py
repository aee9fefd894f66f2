"""The partition model: max-throughput partitioning as an integer program, for graphs too small to need anything else.

`held[v, j]` says that the first j parts hold v. It only grows with j and never leaves out a producer, so that the parts
can be computed one after another; and a tensor goes out of part j where that has its producer and the first j parts
lack a consumer. Solved by CP-SAT, from integers rounded so that its bound is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from bsns.planning.exact import leave_signals_alone
from bsns.planning.graph import Fleet, Ints, OperatorGraph

UNITS = 1_000_000
"""That a known bottleneck is divided into; every cost is rounded down."""
MAX_OPERATORS = 80


@dataclass(frozen=True, slots=True)
class Solved:
    """`lower_s` bounds every partition's bottleneck; the partition is the best that was met, if it was better."""

    lower_s: float
    part_of: tuple[int, ...] | None
    optimal: bool


def solve(
    graph: OperatorGraph,
    fleet: Fleet,
    at_most_s: float,
    early_V: Ints,
    late_V: Ints,
    *,
    low_s: float = 0.0,
    effort: float = 5.0,
) -> Solved:
    """`at_most_s` is a known partition's bottleneck; `early_V` and `late_V` say which parts, from 1, an operator can be
    in within that. Without memory. Runs alike everywhere: `effort` is CP-SAT's own measure, about seconds."""
    parts, unit = fleet.machines, UNITS / at_most_s
    model = cp_model.CpModel()
    io = np.floor(graph.sent_V / fleet.bytes_per_s * unit).astype(np.int64).tolist()
    work = np.floor(graph.work_V * unit).astype(np.int64).tolist()
    held = [[_held(model, v, j, early_V, late_V) for j in range(parts + 1)] for v in range(graph.count)]
    for v, row in enumerate(held):
        for j in range(parts):
            model.add(row[j] <= row[j + 1])
        for u in graph.producers[v]:
            for j in range(1, parts):
                model.add(row[j] <= held[u][j])
    bottleneck = model.new_int_var(math.floor(low_s * unit), UNITS, "bottleneck")
    for j in range(1, parts + 1):
        costs = []
        for v in range(graph.count):
            here = held[v][j] - held[v][j - 1]
            costs.append(work[v] * here)
            if io[v]:
                goes_out, comes_in = model.new_bool_var(f"out {v} {j}"), model.new_bool_var(f"in {v} {j}")
                for c in graph.consumers[v]:
                    model.add(goes_out >= here - held[c][j])
                    model.add(comes_in >= held[c][j] - held[c][j - 1] - here)
                costs += [io[v] * goes_out, io[v] * comes_in]
        model.add(sum(costs) <= bottleneck)
    model.minimize(bottleneck)
    solver = cp_model.CpSolver()
    solver.parameters.max_deterministic_time = effort
    solver.parameters.num_workers = 1
    leave_signals_alone(solver)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        # nothing within the known bottleneck but, by rounding, itself
        return Solved(at_most_s * (1 - 1 / UNITS), None, True)
    lower_s = max(low_s, min(solver.best_objective_bound / unit, at_most_s))
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Solved(lower_s, None, False)
    holds = [[int(solver.value(each)) for each in row] for row in held]
    return Solved(lower_s, tuple(parts - sum(row[1:]) for row in holds), status == cp_model.OPTIMAL)


def _held(model: cp_model.CpModel, v: int, j: int, early_V: Ints, late_V: Ints) -> cp_model.IntVar | int:
    if j < early_V[v]:
        return 0
    return 1 if j >= late_V[v] else model.new_bool_var(f"held {v} {j}")
