"""Blocks as variables of the exact solver: how many each node takes, or from where to where."""

from __future__ import annotations

from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from bsns.planning.chain_dp import Ints
from bsns.planning.problem import Chain, ChainProblem, Stage


def room(problem: ChainProblem) -> Ints:
    """How many blocks, all alike, fit each node."""
    sums_M = np.concatenate([[0.0], np.cumsum(problem.bytes_L)])
    return np.searchsorted(sums_M, problem.memory_N, side="right") - 1


class Counts:
    """Blocks that are all alike: how many each node takes says everything."""

    error = 0

    def __init__(self, model: cp_model.CpModel, problem: ChainProblem, scale: float) -> None:
        self.model = model
        self.goal = problem.block_count
        self.most = np.minimum(room(problem), problem.block_count).tolist()
        self.unit = np.floor(problem.time_N * problem.work_L[0] * scale).astype(np.int64).tolist()
        self.counts = [model.new_int_var(0, most, "") for most in self.most]

    def left_out(self, node: int, arc: Any) -> None:
        self.model.add(self.counts[node] <= self.most[node] * ~arc)
        self.model.add(self.counts[node] >= ~arc)

    def joins(self, before: int, node: int, arc: Any) -> None: ...

    def ends(self, node: int, arc: Any) -> None: ...

    def close(self) -> None:
        self.model.add(sum(self.counts) == self.goal)

    def compute(self, node: int) -> Any:
        return self.counts[node] * self.unit[node]

    def hint(self, chain: Chain) -> None:
        held = {stage.node: stage.end - stage.start for stage in chain}
        for node, count in enumerate(self.counts):
            self.model.add_hint(count, held.get(node, 0))

    def chain(self, solver: cp_model.CpSolver, order: list[int]) -> Chain:
        stages: list[Stage] = []
        start = 0
        for node in order:
            end = start + int(solver.value(self.counts[node]))
            stages.append(Stage(node, start, end))
            start = end
        return tuple(stages)


class Ranges:
    """Unequal blocks: where each node's range begins and ends, and tables of work and room by boundary."""

    def __init__(self, model: cp_model.CpModel, problem: ChainProblem, scale: float) -> None:
        self.model = model
        self.goal = problem.block_count
        count = problem.node_count
        work_M = np.concatenate([[0.0], np.cumsum(problem.work_L)])
        bytes_M = np.concatenate([[0.0], np.cumsum(problem.bytes_L)])
        self.starts = [model.new_int_var(0, self.goal, "") for _ in range(count)]
        self.ends_at = [model.new_int_var(0, self.goal, "") for _ in range(count)]
        self.work: list[Any] = []
        self.most: list[int] = []
        self.error = count  # the difference of two rounded sums is at most one unit too long
        for node in range(count):
            done = np.floor(work_M * problem.time_N[node] * scale).astype(np.int64).tolist()
            last = (np.searchsorted(bytes_M, bytes_M + problem.memory_N[node], side="right") - 1).tolist()
            self.most.append(max(end - start for start, end in enumerate(last)))
            before, after = model.new_int_var(0, done[-1], ""), model.new_int_var(0, done[-1], "")
            limit = model.new_int_var(0, self.goal, "")
            model.add_element(self.starts[node], done, before)
            model.add_element(self.ends_at[node], done, after)
            model.add_element(self.starts[node], last, limit)
            model.add(self.ends_at[node] <= limit)
            model.add(self.ends_at[node] >= self.starts[node])
            self.work.append(after - before)

    def left_out(self, node: int, arc: Any) -> None:
        self.model.add(self.starts[node] == 0).only_enforce_if(arc)
        self.model.add(self.ends_at[node] == 0).only_enforce_if(arc)
        self.model.add(self.ends_at[node] - self.starts[node] >= ~arc)

    def joins(self, before: int, node: int, arc: Any) -> None:
        self.model.add(self.starts[node] == (self.ends_at[before] if before >= 0 else 0)).only_enforce_if(arc)

    def ends(self, node: int, arc: Any) -> None:
        self.model.add(self.ends_at[node] == self.goal).only_enforce_if(arc)

    def close(self) -> None:
        lengths = [end - start for start, end in zip(self.starts, self.ends_at, strict=True)]
        self.model.add(sum(lengths) == self.goal)

    def compute(self, node: int) -> Any:
        return self.work[node]

    def hint(self, chain: Chain) -> None:
        held = {stage.node: stage for stage in chain}
        for node in range(len(self.starts)):
            stage = held.get(node, Stage(node, 0, 0))
            self.model.add_hint(self.starts[node], stage.start)
            self.model.add_hint(self.ends_at[node], stage.end)

    def chain(self, solver: cp_model.CpSolver, order: list[int]) -> Chain:
        return tuple(
            Stage(node, int(solver.value(self.starts[node])), int(solver.value(self.ends_at[node]))) for node in order
        )
