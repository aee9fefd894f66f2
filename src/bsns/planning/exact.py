"""The exact solver: CP-SAT over chains and devices, with a bound that stays valid whenever it is stopped.

Nodes lie on a circuit through the client; a node left out loops onto itself. For equal blocks and the bottleneck
alone, one question is asked again and again: do the nodes reach the end if no turn may take longer than T? It needs
whole numbers of blocks only, so no rounding enters. Otherwise the value itself is minimised, in whole units, rounded
down, so that what is proven of the rounded problem holds for the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from bsns.core.plan import Objective
from bsns.planning.chain_dp import TOLERANCE, Ints, least_bottleneck
from bsns.planning.exact_blocks import Counts, Ranges, room
from bsns.planning.problem import Chain, ChainProblem, Floats

VALUE_UNITS = 2**30
"""Of the hint's value, in the rounded problem: what rounding costs is far below what is called proven."""
WEIGHT_UNITS = 2**20
PATIENCE = 0.35
"""One question of the bisection gets so much of the time left; what it leaves open still counts where it is easier."""
DIRECT_NODES = 32
"""Beyond, a mixed objective is bounded by its two parts first."""
WORKERS = 1
"""Deterministic but for where the time ends. A few more are worse: none of them then has the linear relaxation, and a
question that one answers in 0.05 s stood open after 6 s with two (80 blocks, 64 nodes, clusters)."""
CIRCUIT_CUTS = 2
"""The linearization level that has cuts of the circuit: what took seconds takes hundredths."""
PLAIN_SHARE = 0.25
LEAST_S = 0.02
"""Less time than this is not worth building a model for."""


@dataclass(frozen=True, slots=True)
class ExactlySolved:
    """The best chain known (the hint, if none is better), a bound that no chain beats, and whether they meet."""

    chain: Chain | None
    bound_s: float
    proven: bool


def solve_exactly(
    problem: ChainProblem,
    objective: Objective,
    *,
    remaining_s: Callable[[], float],
    hint: Chain | None = None,
    bound_s: float = 0.0,
    seed: int = 0,
) -> ExactlySolved:
    """Minimise the objective; `bound_s` is a bound already known. Infinite bound: no chain fits."""
    alike = _alike(problem)
    search = _Search(remaining_s, seed)
    if alike and objective.latency == 0:
        found = _least_bottleneck(problem, search, hint, bound_s / objective.bottleneck)
        return ExactlySolved(found.chain, found.bound_s * objective.bottleneck, found.proven)
    if objective.bottleneck and objective.latency and problem.node_count > DIRECT_NODES and alike:
        return _least_mixture(problem, objective, search, hint, bound_s)
    return _least_value(problem, objective, search, hint, bound_s)


def _alike(problem: ChainProblem) -> bool:
    return bool(np.ptp(problem.work_L) == 0 and np.ptp(problem.bytes_L) == 0)


@dataclass(frozen=True, slots=True)
class _Search:
    remaining_s: Callable[[], float]
    seed: int

    def for_share(self, share: float) -> _Search:
        """The same with so much of the time that is left now."""
        kept_s = self.remaining_s() * (1 - share)
        return _Search(lambda: self.remaining_s() - kept_s, self.seed)

    def run(
        self, model: cp_model.CpModel, share: float = 1.0, enough: int | None = None
    ) -> tuple[cp_model.CpSolver, Any]:
        """Solve; where the objective is to reach `enough`, only until that is certain or out of the question."""
        if enough is None:
            return self._least(model, self.remaining_s() * share)
        solver = self._solver(self.remaining_s() * share, CIRCUIT_CUTS)
        wanted = enough - 0.5

        def refuted(bound: float) -> None:
            if bound < wanted:
                solver.stop_search()

        solver.best_bound_callback = refuted
        return solver, solver.solve(model, _StopAt(wanted))

    def _least(self, model: cp_model.CpModel, budget_s: float) -> tuple[cp_model.CpSolver, Any]:
        """Minimise: for a while without the linear relaxation, which alone can stand before a handful of blocks on two
        nodes for ever; then with it. Of what neither settles, whichever found the better solution.

        The first restarts often and changes what it branches on. The default raises the value by a unit at a time,
        and stood before four blocks on two nodes for as long as it was let."""
        plain = self._solver(budget_s * PLAIN_SHARE, 0)
        plain.parameters.search_branching = cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH
        status = plain.solve(model)
        if status in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
            return plain, status
        linear = self._solver(budget_s * (1 - PLAIN_SHARE), CIRCUIT_CUTS)
        second = linear.solve(model)
        found = status == cp_model.FEASIBLE
        if second in (cp_model.OPTIMAL, cp_model.INFEASIBLE) or not found:
            return linear, second
        better = second == cp_model.FEASIBLE and linear.objective_value <= plain.objective_value
        return (linear, second) if better else (plain, status)

    def _solver(self, budget_s: float, linearization: int) -> cp_model.CpSolver:
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(LEAST_S, budget_s)
        solver.parameters.num_workers = WORKERS
        solver.parameters.random_seed = self.seed
        solver.parameters.linearization_level = linearization
        leave_signals_alone(solver)
        return solver


def leave_signals_alone(solver: cp_model.CpSolver) -> None:
    """Keep CP-SAT from catching SIGINT, which it does by default, for the thread that solves alone: on Ctrl-C in any
    other it aborts the process, and once it is done Ctrl-C kills at once, for it has put the default in its place."""
    solver.parameters.catch_sigint_signal = False


class _StopAt(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
    def __init__(self, wanted: float) -> None:
        super().__init__()
        self.wanted = wanted

    def on_solution_callback(self) -> None:
        if self.objective_value >= self.wanted:
            self.stop_search()


def _least_mixture(
    problem: ChainProblem, objective: Objective, search: _Search, hint: Chain | None, bound_s: float
) -> ExactlySolved:
    """Large mixed problems: no chain has less than the least latency and the least bottleneck, each found by itself.

    Both start and bound the search for the least mixture.
    """
    steady = _least_bottleneck(problem, search.for_share(0.35), hint, 0.0)
    quick = _least_value(problem, Objective(0.0, 1.0), search.for_share(0.5), hint, 0.0)
    chains = [chain for chain in (hint, steady.chain, quick.chain) if chain is not None]
    best = min(chains, key=lambda chain: problem.value(chain, objective), default=None)
    bound_s = max(bound_s, objective.value(steady.bound_s, quick.bound_s))
    return _least_value(problem, objective, search, best, bound_s, floors=(steady.bound_s, quick.bound_s))


def _least_bottleneck(problem: ChainProblem, search: _Search, hint: Chain | None, bound_s: float) -> ExactlySolved:
    """Bisection over the turns that are possible at all: just below the best known first, for that proves it best."""
    turns = _possible_turns(problem)
    room_N = room(problem)
    if float(room_N.sum()) < problem.block_count:
        return ExactlySolved(None, math.inf, True)
    best = hint
    high = len(turns) if best is None else int(np.searchsorted(turns, problem.cost(best)[0] * (1 - TOLERANCE)))
    low = int(np.searchsorted(turns, bound_s * (1 - TOLERANCE))) - 1  # the highest turn known to be too short
    # from the middle on: far below the least bottleneck a proof takes a moment, just below it the longest
    middle_s = (turns[max(low, 0)] + turns[min(high, len(turns) - 1)]) / 2
    probe = min(max(int(np.searchsorted(turns, middle_s)), low + 1), max(high - 1, low + 1))
    hard = high  # from `hard` on, questions have proven too hard to answer in time
    while low < hard - 1 and search.remaining_s() > LEAST_S:
        status, order = _reaches_end(problem, room_N, float(turns[probe]), search, best)
        if order is not None:
            chain = least_bottleneck(problem, order)
            assert chain is not None, "the solver has just found one in this order"
            best = chain
            high = min(probe, int(np.searchsorted(turns, problem.cost(best)[0] * (1 - TOLERANCE))))
        elif status == cp_model.INFEASIBLE:
            low = probe
        else:
            hard = probe
        hard = min(hard, high)
        middle_s = (turns[max(low, 0)] + turns[min(hard, len(turns) - 1)]) / 2
        probe = min(max(int(np.searchsorted(turns, middle_s)), low + 1), max(hard - 1, low + 1))
    if best is None and low >= len(turns) - 1:
        return ExactlySolved(None, math.inf, True)
    proven = best is not None and low >= high - 1
    next_s = float(turns[min(low + 1, len(turns) - 1)])  # nothing happens between two possible turns
    known_s = problem.cost(best)[0] if best is not None else math.inf
    return ExactlySolved(best, known_s if proven else min(max(bound_s, next_s * (1 - TOLERANCE)), known_s), proven)


def _possible_turns(problem: ChainProblem) -> Floats:
    """Every time that a stage, or the client, can take, in order."""
    blocks_B = np.arange(1, problem.block_count + 1) * problem.work_L[0]
    ways = np.vstack([problem.entry_N[None, :], problem.hop_NN])
    turns = ways[:, :, None] + (problem.time_N[:, None] * blocks_B)[None, :, :]
    return np.unique(np.concatenate([turns.ravel(), problem.exit_N + problem.client_s]))


def _reaches_end(
    problem: ChainProblem, room_N: Ints, limit_s: float, search: _Search, near: Chain | None
) -> tuple[Any, list[int] | None]:
    """Whether some circuit of the client and nodes takes all blocks with no turn longer than `limit_s`, and which."""
    limit_s *= 1 + TOLERANCE
    ways = np.vstack([problem.entry_N[None, :], problem.hop_NN])
    per_block_N = problem.time_N * problem.work_L[0]
    blocks = np.floor((limit_s - ways) / per_block_N * (1 + TOLERANCE) + TOLERANCE).astype(np.int64)
    blocks = np.minimum(np.clip(blocks, 0, problem.block_count), room_N)
    model = cp_model.CpModel()
    arcs: list[tuple[int, int, Any]] = []
    taken: list[Any] = []
    counts: list[int] = []
    used = _arcs_of(near)
    for before, node in zip(*np.nonzero(blocks), strict=True):
        if before == node + 1:
            continue
        arc = model.new_bool_var("")
        arcs.append((int(before), int(node) + 1, arc))
        taken.append(arc)
        counts.append(int(blocks[before, node]))
        if near is not None:
            model.add_hint(arc, (int(before), int(node) + 1) in used)
    for node in range(problem.node_count):
        out = model.new_bool_var("")
        arcs.append((node + 1, node + 1, out))
        if problem.exit_N[node] + problem.client_s <= limit_s:
            back = model.new_bool_var("")
            arcs.append((node + 1, 0, back))
    if not any(before == 0 for before, _, _ in arcs) or not any(node == 0 for _, node, _ in arcs):
        return cp_model.INFEASIBLE, None  # nobody can be first, or last; the circuit would leave the client out
    model.add_circuit(arcs)
    if problem.node_count > problem.block_count:
        model.add(sum(taken) <= problem.block_count)  # whoever is on the way takes a block
    # asked for the most blocks rather than for enough, the linear relaxation leads: four times faster to refute
    model.maximize(cp_model.LinearExpr.weighted_sum(taken, counts))
    solver, status = search.run(model, PATIENCE, enough=problem.block_count)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) and solver.objective_value >= problem.block_count - 0.5:
        return cp_model.FEASIBLE, _order(solver, arcs)
    # cut off while it still reads the model, CP-SAT says 0, which is no bound: whoever is first takes a block
    bounded = status == cp_model.FEASIBLE or solver.best_objective_bound > 0
    if status == cp_model.INFEASIBLE or (bounded and solver.best_objective_bound < problem.block_count - 0.5):
        return cp_model.INFEASIBLE, None
    return cp_model.UNKNOWN, None


def _arcs_of(chain: Chain | None) -> set[tuple[int, int]]:
    places = [0, *(stage.node + 1 for stage in chain or ()), 0]
    return set(pairwise(places))


def _order(solver: cp_model.CpSolver, arcs: list[tuple[int, int, Any]]) -> list[int]:
    after = {before: node for before, node, arc in arcs if before != node and solver.boolean_value(arc)}
    order: list[int] = []
    place = after[0]
    while place:
        order.append(place - 1)
        place = after[place]
    return order


def _least_value(
    problem: ChainProblem,
    objective: Objective,
    search: _Search,
    hint: Chain | None,
    bound_s: float,
    floors: tuple[float, float] = (0.0, 0.0),
) -> ExactlySolved:
    """Minimise the rounded value directly. Times are rounded down, so its bound is one of the real problem too.

    `floors`: what is known of the least bottleneck and the least latency.
    """
    alike = _alike(problem)
    count = problem.node_count
    longest_s = problem.cost(hint)[1] if hint is not None else _at_most(problem)
    scale = VALUE_UNITS / longest_s
    way_s = np.vstack([problem.entry_N[None, :], problem.hop_NN])
    way = np.floor(np.minimum(way_s, 2 * longest_s) * scale).astype(np.int64)
    back = np.floor(np.minimum(problem.exit_N + problem.client_s, 2 * longest_s) * scale).astype(np.int64)
    model = cp_model.CpModel()
    used = _arcs_of(hint)
    arcs: list[tuple[int, int, Any]] = []
    into: list[list[tuple[Any, int]]] = [[] for _ in range(count)]
    held = Counts(model, problem, scale) if alike else Ranges(model, problem, scale)
    for before in range(count + 1):
        for node in range(1, count + 1):
            arc = model.new_bool_var("")
            if before == node:
                held.left_out(node - 1, arc)
            elif way_s[before, node - 1] > longest_s or held.most[node - 1] == 0:
                model.add(arc == 0)
                continue
            else:
                into[node - 1].append((arc, int(way[before, node - 1])))
                held.joins(before - 1, node - 1, arc)
            arcs.append((before, node, arc))
    turns: list[Any] = []
    backs: list[Any] = []
    for node in range(count):
        arc = model.new_bool_var("")
        arcs.append((node + 1, 0, arc))
        held.ends(node, arc)
        backs.append(arc * int(back[node]))
        turns.append(held.compute(node) + sum(arc * cost for arc, cost in into[node]))
    model.add_circuit(arcs)
    held.close()
    weight = objective.bottleneck + objective.latency
    steady = math.floor(objective.bottleneck / weight * WEIGHT_UNITS)
    quick = math.floor(objective.latency / weight * WEIGHT_UNITS)
    common = math.gcd(steady, quick)
    terms: list[Any] = []
    rounded = problem.block_count + 2 * count + 2  # so many figures may each have lost a unit
    if steady:
        slowest = model.new_int_var(_below(floors[0], scale, rounded), 4 * VALUE_UNITS, "")
        for turn in turns:
            model.add(slowest >= turn)
        model.add(slowest >= sum(backs))
        terms.append(slowest * (steady // common))
    if quick:
        whole = model.new_int_var(_below(floors[1], scale, rounded), 4 * VALUE_UNITS * (count + 1), "")
        model.add(whole == sum(turns) + sum(backs))
        terms.append(whole * (quick // common))
    model.minimize(sum(terms))
    if hint is not None:
        for before, node, arc in arcs:
            inside = before != node and (before, node) in used
            model.add_hint(arc, inside or (before == node and node - 1 not in {stage.node for stage in hint}))
        held.hint(hint)
    solver, status = search.run(model)
    if status == cp_model.INFEASIBLE:
        return ExactlySolved(hint, math.inf if hint is None else bound_s, hint is None)
    unit = scale * WEIGHT_UNITS / common / weight
    proven_s = (
        (solver.best_objective_bound - held.error * (steady + quick) / common) / unit
        if math.isfinite(solver.best_objective_bound)
        else 0.0
    )
    bound_s = max(bound_s, proven_s)
    best = hint
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        order = _order(solver, arcs)
        chain = held.chain(solver, order)
        if problem.fits(chain) and (best is None or problem.value(chain, objective) < problem.value(best, objective)):
            best = chain
    return ExactlySolved(best, bound_s, status == cp_model.OPTIMAL)


def _below(seconds: float, scale: float, rounded: int) -> int:
    return max(0, math.floor(seconds * (1 - 1e-9) * scale) - rounded) if math.isfinite(seconds) else 0


def _at_most(problem: ChainProblem) -> float:
    """No chain takes longer than this: every node's slowest way, and all work on the slowest."""
    ways_s = np.maximum(problem.hop_NN.max(axis=0), problem.entry_N).sum() + problem.exit_N.max() + problem.client_s
    return float(ways_s + problem.work_L.sum() * problem.time_N.max())
