"""Whether the shape of a swarm helps to find a plan: regret of looked-up plans by what they are looked up by.

Libraries are built on synthetic swarms of three kinds and several sizes, and looked up for others. Regret = value of
the best of the m nearest schemas, re-scored and otherwise taken as it is, beside the best value known for that swarm,
less 1. The same m for all keys; geometric means; several seeds, each with a library and held-out swarms of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bsns.core.errors import NotEnoughMemory
from bsns.core.ids import ModelId
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.planning.chain_dp import best_cut, nearest_order
from bsns.planning.likeness import KEYS, likeness, nearest
from bsns.planning.planner import Clock, solve_chain
from bsns.planning.problem import ChainProblem, Floats
from bsns.planning.schemas import Library, build, lookup, problem_of, score
from bsns.planning.transfer import transferred
from bsns.topology.synthetic import KINDS, synthetic

Told = Callable[[str], None]

SHAPE = ModelShape(ModelId("llama-8b-like"), "llama-8b-like", (500_000_000,) * 32, 0, 8192)
OBJECTIVE = Objective.named("throughput")
SIZES = (12, 32, 8, 24, 16, 48)
LOOKED_AT = 3
"""m."""
DRAWS = 25
"""Random choices that the key `none` is averaged over."""
RESAMPLES = 2000
NO_KEY = "no_library"
"""The exact cut along nearest neighbours, which needs no library."""
ORACLE = "best_in_library"
"""What a perfect key would reach with m = 1."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is spent: swarms and seconds for each."""

    seeds: int
    library: int
    held_out: int
    build_s: float
    best_s: float
    refine_s: float


QUICK = Effort(seeds=2, library=18, held_out=9, build_s=0.15, best_s=0.4, refine_s=0.2)
FULL = Effort(seeds=3, library=36, held_out=18, build_s=0.5, best_s=1.0, refine_s=0.3)


def run_ablation(quick: bool, told: Told) -> dict[str, Any]:
    """`ablation.regret.{ph,distances,features,none}` with their spread, and what looking up costs in the chain suite's
    terms: `chain.gap.{schema,schema_refined}` to the lower bound, `chain.ms` of the two."""
    return measure(QUICK if quick else FULL, told)


def measure(effort: Effort, told: Told) -> dict[str, Any]:
    """The figures for this effort."""
    rows: dict[str, list[Floats]] = {}
    gaps: dict[str, list[float]] = {"schema": [], "schema_refined": []}
    ms: dict[str, list[float]] = {"schema": [], "schema_refined": []}
    infeasible = 0
    for seed in range(effort.seeds):
        rng = np.random.default_rng(seed)
        library = _library(effort, rng, seed, told)
        regrets: dict[str, list[float]] = {}
        for number in range(effort.held_out):
            told(f"seed {seed + 1} of {effort.seeds}: held-out swarm {number + 1} of {effort.held_out}")
            snapshot = _drawn(number, rng)
            problem = problem_of(snapshot, SHAPE)
            try:
                best = solve_chain(problem, OBJECTIVE, rng=rng, remaining_s=clock(effort.best_s))
            except NotEnoughMemory:
                infeasible += 1
                continue
            values_S = _values(library, problem)
            taken, refined = _looked_up(library, snapshot, rng, effort, ms)
            least = min(best.value, refined, float(values_S.min()))
            for name, value in _by_key(library, snapshot, problem, values_S, rng).items():
                regrets.setdefault(name, []).append(value - float(np.log(least)))
            if np.isfinite(taken):
                gaps["schema"].append(float(np.log(taken / best.lower_bound_s)))
            gaps["schema_refined"].append(float(np.log(refined / best.lower_bound_s)))
        for name, logs in regrets.items():
            rows.setdefault(name, []).append(np.array(logs))
    resampled = np.random.default_rng(0)
    spans = {name: _span(np.concatenate(logs), resampled) for name, logs in rows.items()}
    keyed = np.concatenate(rows["ph"])
    return {
        "ablation": {
            "regret": {name: _ratio(np.concatenate(rows[name])) for name in KEYS},
            "regret_low": {name: spans[name][0] for name in KEYS},
            "regret_high": {name: spans[name][1] for name in KEYS},
            "regret_by_seed": {name: [_ratio(logs) for logs in rows[name]] for name in KEYS},
            "ph_worse_than": {
                # paired: the same swarms; an interval that holds 0 says that no difference was shown
                name: list(_span(keyed - np.concatenate(rows[name]), resampled))
                for name in (*KEYS, NO_KEY)
                if name != "ph"
            },
            NO_KEY: _ratio(np.concatenate(rows[NO_KEY])),
            ORACLE: _ratio(np.concatenate(rows[ORACLE])),
            "m": LOOKED_AT,
            "library": effort.library,
            "held_out": len(keyed),
            "infeasible": infeasible,
        },
        "chain": {
            "gap": {name: _ratio(np.array(logs)) for name, logs in gaps.items()},
            "ms": {name: round(float(np.median(spent)), 2) for name, spent in ms.items()},
        },
    }


def clock(seconds: float) -> Clock:
    """What is left of so many seconds from now on."""
    end_s = time.monotonic() + seconds
    return lambda: end_s - time.monotonic()


def _drawn(number: int, rng: np.random.Generator) -> Snapshot:
    """A swarm of the next kind, and every third time of the next size."""
    nodes = SIZES[number // len(KINDS) % len(SIZES)]
    return synthetic(KINDS[number % len(KINDS)], nodes, rng, model_bytes=float(sum(SHAPE.block_bytes)))


def _library(effort: Effort, rng: np.random.Generator, seed: int, told: Told) -> Library:
    swarms = [_drawn(number, rng) for number in range(effort.library)]

    def say(done: int) -> None:
        told(f"seed {seed + 1} of {effort.seeds}: schema {done + 1} of {effort.library}")

    return build(SHAPE, swarms, objective=OBJECTIVE, rng=rng, clock=lambda: clock(effort.build_s), told=say)


def _values(library: Library, problem: ChainProblem) -> Floats:
    """(S,) What every schema's plan is worth here; inf where it does not fit."""
    chains = [transferred(problem, schema.roles, OBJECTIVE) for schema in library.schemas]
    return np.array([np.inf if chain is None else problem.value(chain, OBJECTIVE) for chain in chains])


def _by_key(
    library: Library, snapshot: Snapshot, problem: ChainProblem, values_S: Floats, rng: np.random.Generator
) -> dict[str, float]:
    """Logarithms of the value that each key leads to. Where none of the m fits one falls back to having no library."""
    chain = best_cut(problem, nearest_order(problem), OBJECTIVE)
    without = np.inf if chain is None else problem.value(chain, OBJECTIVE)
    fallback = without if np.isfinite(without) else float(values_S.max(where=np.isfinite(values_S), initial=0.0))
    known = [schema.like for schema in library.schemas]
    like = likeness(snapshot, SHAPE)
    found: dict[str, float] = {NO_KEY: float(np.log(fallback)), ORACLE: float(np.log(values_S.min()))}
    for key in KEYS:
        draws = [nearest(key, like, known, LOOKED_AT, rng) for _ in range(DRAWS if key == "none" else 1)]
        values = np.array([values_S[chosen].min() for chosen in draws])
        found[key] = float(np.log(np.where(np.isfinite(values), values, fallback)).mean())
    return found


def _looked_up(
    library: Library, snapshot: Snapshot, rng: np.random.Generator, effort: Effort, ms: dict[str, list[float]]
) -> tuple[float, float]:
    """The values of the plan that is taken as it is (inf if none fits), and of the refined one, each timed whole."""
    start_s = time.perf_counter()
    problem = problem_of(snapshot, SHAPE)
    found = score(library, snapshot, problem, SHAPE, OBJECTIVE, LOOKED_AT, rng)
    ms["schema"].append((time.perf_counter() - start_s) * 1e3)
    start_s = time.perf_counter()
    refined = lookup(library, snapshot, SHAPE, OBJECTIVE, LOOKED_AT, rng, clock(effort.refine_s), np.inf)
    ms["schema_refined"].append((time.perf_counter() - start_s) * 1e3)
    return found[0][0] if found else np.inf, refined.value_s


def _ratio(logs: Floats) -> float:
    """Geometric mean of the ratios, less 1."""
    return round(float(np.expm1(logs.mean())), 5)


def _span(logs: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """The middle 95 % of what other draws of the same swarms would have given (bootstrap)."""
    means = logs[rng.integers(len(logs), size=(RESAMPLES, len(logs)))].mean(axis=1)
    low, high = np.expm1(np.quantile(means, [0.025, 0.975]))
    return round(float(low), 5), round(float(high), 5)
