"""`bsns bench plan --part chain`: how near chains over unequal nodes come to the best possible, beside others' rules.

A fixed suite: models of 8, 32 and 80 blocks, 4 to 64 nodes, three kinds of network, several seeds. Gap = value /
reference − 1, the reference being the highest lower bound that any run has proven of the instance: the optimum,
wherever it was proven. Geometric means; instances whose memory a rule breaks are counted and left out of its mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsns.core.ids import ModelId
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape
from bsns.planning.bounds import lower_bound
from bsns.planning.network import chain_problem
from bsns.planning.planner import Solved, best_cut_nearest, make_plan, solve_chain
from bsns.planning.problem import Chain, ChainProblem
from bsns.planning.rival_rules import by_memory, by_speed, equal, petals
from bsns.topology.synthetic import KINDS, Kind, synthetic

Told = Callable[[str], None]

MODEL_BYTES = 16e9
HIDDEN_BYTES = 8192
CLIENT_S = 1e-3
BLOCKS = (8, 32, 80)
NODES = (4, 12, 24, 64)
RIVALS: dict[str, Callable[[ChainProblem], Chain | None]] = {
    "equal": equal,
    "memory": by_memory,
    "petals": petals,
    "greedy_dp": by_speed,
}
METHODS = ("planner", "brkga", "exact", "dp", *RIVALS)
BUDGET_S = 1.0
BUDGET_64_S = 5.0
"""For 64 nodes and more."""
REFERENCE_FACTOR = 4
"""So many times the budget is spent on the reference, where the planner has proven nothing."""
SCALE_S = {1000: 2.0, 10_000: 30.0}
SCALE_SHARE = 0.5
"""Of those, as the planner's time: the rest is for what lies around the search."""


@dataclass(frozen=True, slots=True)
class Instance:
    kind: Kind
    blocks: int
    nodes: int
    seed: int
    objective: str

    @property
    def budget_s(self) -> float:
        return BUDGET_64_S if self.nodes >= 64 else BUDGET_S

    def problem(self) -> ChainProblem:
        rng = np.random.default_rng([self.seed, self.blocks, self.nodes, KINDS.index(self.kind)])
        snapshot = synthetic(self.kind, self.nodes, rng, model_bytes=MODEL_BYTES)
        return chain_problem(snapshot, _shape(self.blocks), client_s=CLIENT_S)


def instances(*, quick: bool) -> list[Instance]:
    """The suite; `quick`: one seed, throughput only, fewer of the large ones."""
    seeds = (0,) if quick else (0, 1, 2)
    chosen = [
        Instance(kind, blocks, nodes, seed, "throughput")
        for seed in seeds
        for nodes in NODES
        for blocks in BLOCKS
        for kind in KINDS
        if not quick or nodes < 64 or blocks == 80
    ]
    if not quick:
        chosen += [
            Instance(kind, blocks, nodes, 0, objective)
            for objective in ("latency", "mixed")
            for nodes in NODES
            for blocks in BLOCKS
            for kind in KINDS
        ]
    return chosen


def run_chain_suite(quick: bool, told: Told) -> dict[str, Any]:
    """Solve the suite by every method, and plan for a thousand nodes and for ten thousand."""
    began_s = time.perf_counter()
    suite = instances(quick=quick)
    rows: list[dict[str, Any]] = []
    for number, instance in enumerate(suite):
        told(f"chains {number + 1} of {len(suite)}: {instance.blocks} blocks on {instance.nodes} nodes")
        rows.append(_row(instance))
    scale: dict[str, Any] = {}
    for nodes in SCALE_S:
        told(f"a plan for {nodes} nodes")
        scale |= _scale(nodes)
    throughput = [row for row in rows if row["objective"] == "throughput"]
    large = [row for row in throughput if row["nodes"] == 64]
    return {
        "chain": {
            "gap": _gaps(throughput),
            "gap_median": _medians(throughput),
            "gap_80x24": _gaps([row for row in throughput if row["blocks"] == 80 and row["nodes"] == 24]),
            "gap_64_nodes": _gaps(large),
            "gap_64_nodes_median": _medians(large),
            "by_size": {
                f"{blocks}x{nodes}": _gaps(some)
                for blocks in BLOCKS
                for nodes in NODES
                if (some := [row for row in throughput if row["blocks"] == blocks and row["nodes"] == nodes])
            },
            "by_kind": {kind: _gaps([row for row in throughput if row["kind"] == kind]) for kind in KINDS},
            "by_objective": {
                objective: _gaps([row for row in rows if row["objective"] == objective])
                for objective in dict.fromkeys(row["objective"] for row in rows)
            },
            "ms": {method: _mean([row["ms"][method] for row in rows]) for method in METHODS},
            "impossible": {name: sum(row["value"][name] is None for row in rows) for name in RIVALS},
            "beaten_by_a_rival": sum(row["beaten"] for row in rows),
            "proven": sum(row["proven"] for row in rows),
            "instances": len(rows),
            "seconds": round(time.perf_counter() - began_s, 1),
            "rows": rows,
        },
        "scale": scale,
    }


def _row(instance: Instance) -> dict[str, Any]:
    problem, objective = instance.problem(), Objective.named(instance.objective)
    ms: dict[str, float] = {}
    value: dict[str, float | None] = {}

    def timed(name: str, run: Callable[[], Chain | None]) -> None:
        started_s = time.perf_counter()
        chain = run()
        ms[name] = round((time.perf_counter() - started_s) * 1e3, 2)
        value[name] = None if chain is None else problem.value(chain, objective)

    solved: list[Solved] = []

    def solve(budget_s: float, engines: Sequence[str], warm: Sequence[Chain] = ()) -> Chain:
        end_s = time.perf_counter() + budget_s
        found = solve_chain(
            problem,
            objective,
            rng=np.random.default_rng(instance.seed),
            remaining_s=lambda: end_s - time.perf_counter(),
            engines=engines,
            warm=warm,
        )
        solved.append(found)
        return found.chain

    for name, rule in RIVALS.items():
        timed(name, lambda rule=rule: rule(problem))  # type: ignore[misc]
    timed("dp", lambda: best_cut_nearest(problem, objective))
    timed("brkga", lambda: solve(instance.budget_s, ("brkga",)))
    timed("exact", lambda: solve(instance.budget_s, ("exact",)))
    timed("planner", lambda: solve(instance.budget_s, ("rules", "brkga", "exact")))
    planned = solved[-1]
    if not any(found.proven for found in solved):
        best = min(solved, key=lambda found: found.value)
        solve(instance.budget_s * REFERENCE_FACTOR, ("exact",), [best.chain])
    reference_s = max(lower_bound(problem, objective), *(found.lower_bound_s for found in solved))
    rivals = [seconds for name in RIVALS if (seconds := value[name]) is not None]
    return {
        "kind": instance.kind,
        "blocks": instance.blocks,
        "nodes": instance.nodes,
        "seed": instance.seed,
        "objective": instance.objective,
        "proven": any(found.proven for found in solved),
        "reference_s": reference_s,
        "reported_gap": round(planned.gap, 6),
        "method": planned.method,
        "beaten": any(seconds < planned.value * (1 - 1e-9) for seconds in rivals),
        "value": value,
        "ratio": {name: None if seconds is None else seconds / reference_s for name, seconds in value.items()},
        "ms": ms,
    }


def _scale(nodes: int) -> dict[str, Any]:
    snapshot = synthetic("lan_wan", nodes, np.random.default_rng(0), model_bytes=MODEL_BYTES)
    started_s = time.perf_counter()
    end_s = started_s + SCALE_S[nodes] * SCALE_SHARE
    plan = make_plan(
        snapshot,
        _shape(32),
        cache_tokens=0,
        rng=np.random.default_rng(0),
        remaining_s=lambda: end_s - time.perf_counter(),
    )
    return {
        f"ms_{nodes}_nodes": round((time.perf_counter() - started_s) * 1e3, 1),
        f"gap_{nodes}_nodes": round(plan.gap, 4),
    }


def _shape(blocks: int) -> ModelShape:
    return ModelShape(ModelId("suite"), "suite", (int(MODEL_BYTES / blocks),) * blocks, 0, HIDDEN_BYTES)


def _ratios(rows: list[dict[str, Any]], method: str) -> list[float]:
    return [row["ratio"][method] for row in rows if row["ratio"][method] is not None]


def _gaps(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric mean of value / reference, less 1, by method."""
    return {
        method: round(math.exp(float(np.mean(np.log(ratios)))) - 1, 5)
        for method in METHODS
        if (ratios := _ratios(rows, method))
    }


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {method: round(float(np.median(ratios)) - 1, 5) for method in METHODS if (ratios := _ratios(rows, method))}


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 2) if values else math.nan
