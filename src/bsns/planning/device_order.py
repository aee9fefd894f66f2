"""Orders of devices as random keys: who comes after whom, and who is left out; how the blocks are cut follows.

BRKGA's third decoder beside graph orders and heuristic weights. One key per node and one that divides the nodes in use
from those left out. A whole population is cut at once: given who follows whom, a limit T on every turn says how many
blocks each node can take, and the fastest take theirs first. Generations take turns with a local search of the best,
which moves, exchanges and reverses nodes; what either finds is cut exactly in the end (`chain_dp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.brkga import Settings, evolve
from bsns.planning.chain_dp import TOLERANCE, Ints, best_cut
from bsns.planning.order_costs import MISFIT, Scorer
from bsns.planning.path_search import PathSearch
from bsns.planning.problem import Chain, ChainProblem, Floats, Stage

POPULATION = Settings(population=80, generations=15)
"""Of one round, after which the local search has its turn."""
SHAKES = 60
"""Of one local search."""
PATIENCE = 10
"""Rounds without a better chain after which more of the same is hopeless."""
POLISH_SLACK = 1e-3


def keys_of(chain: Chain, node_count: int) -> Floats:
    """Keys (node_count + 1,) that decode to a chain's order; the last divides it from the nodes left out."""
    used = [stage.node for stage in chain]
    inside = set(used)
    order = [*used, node_count, *(node for node in range(node_count) if node not in inside)]
    keys = np.empty(node_count + 1)
    keys[order] = (np.arange(node_count + 1) + 0.5) / (node_count + 1)
    return keys


def orders_of(keys_PK: Floats) -> tuple[Ints, Ints]:
    """Orders (P, N) of all nodes, and how many of each (P,) are in use: those before the dividing key, at least one."""
    count = keys_PK.shape[1] - 1
    by_key = np.argsort(keys_PK, axis=1, kind="stable")
    used_P = np.argmax(by_key == count, axis=1)
    orders_PN = by_key[by_key != count].reshape(len(keys_PK), count)
    return orders_PN, np.maximum(used_P, 1)


def search_orders(
    problem: ChainProblem,
    objective: Objective,
    *,
    rng: np.random.Generator,
    warm: Sequence[Chain] = (),
    should_stop: Callable[[], bool] = lambda: False,
    good_enough: float = 0.0,
) -> Chain | None:
    """The best chain found until `should_stop`, until nothing better comes, or until its value is `good_enough`.

    Never worse than the best of `warm`.
    """
    scorer = Scorer(problem, objective)
    best: Chain | None = None
    least = math.inf
    for chain in warm:
        if problem.value(chain, objective) < least:
            best, least = chain, problem.value(chain, objective)
    warm_WK = np.array([keys_of(chain, problem.node_count) for chain in warm]).reshape(-1, problem.node_count + 1)
    stale = 0
    while stale < PATIENCE and least > good_enough and not should_stop():
        evolved = evolve(
            lambda keys_PK: scorer.costs_of(*orders_of(keys_PK)),
            problem.node_count + 1,
            rng=rng,
            settings=POPULATION,
            warm=warm_WK[-POPULATION.population // 2 :],
            should_stop=should_stop,
        )
        starts = [evolved.keys, *((keys_of(best, problem.node_count),) if best is not None else ())]
        found, better = [evolved.keys], False
        for start in starts:
            if should_stop():
                break
            found.append(climb(scorer, start, rng, should_stop))
        for keys in found:
            cut = best_cut(problem, path_of(keys).tolist(), objective, slack=POLISH_SLACK)
            if cut is not None and problem.value(cut, objective) < least * (1 - TOLERANCE):
                best, least, better = cut, problem.value(cut, objective), True
        stale = 0 if better else stale + 1
        warm_WK = np.concatenate([warm_WK, *(keys[None] for keys in found)])[-POPULATION.population :]
        if best is not None:
            warm_WK = np.concatenate([warm_WK, keys_of(best, problem.node_count)[None]])
    return best


def path_of(keys: Floats) -> Ints:
    """The nodes in use, in order."""
    orders_PN, used_P = orders_of(keys[None])
    return orders_PN[0, : used_P[0]]


def climb(scorer: Scorer, keys: Floats, rng: np.random.Generator, should_stop: Callable[[], bool]) -> Floats:
    """Local search from a chromosome: paths of great worth under a limit that follows the best path found.

    For the bottleneck the limit stays below the best known, nearer after every failure. Otherwise a block has a price
    that rises while too few are bought (the Lagrangian of covering all blocks), and each path is scored as it is.
    """
    path = best = path_of(keys)
    cost = scorer.cost_of(path)
    fitting = cost < MISFIT
    below, price = 0.03, scorer.price(path)
    throughput = scorer.objective.latency == 0
    shaken = 0
    while shaken < SHAKES and not should_stop():
        shaken += 1
        limit_s = (
            scorer.limit_below(best, below if throughput else float(rng.uniform(-0.3, 0.15)))
            if fitting
            else scorer.top_s
        )
        search = PathSearch(scorer.worth(limit_s, price))
        trial, worth = search.improve(search.shake(path, rng) if shaken > 1 else path, should_stop, scorer.enough)
        if throughput:
            fits = worth >= scorer.enough
            if not fits:
                if worth >= search.total(path) - 1e-9:
                    path = trial
                if shaken % 12 == 0:
                    below = max(below / 2, 5e-4)
                continue
        else:
            price *= 1.12 if scorer.given(trial, limit_s) < scorer.work else 0.93
        now = scorer.cost_of(trial)
        if now < cost:
            best, cost, fitting = trial, now, now < MISFIT
            shaken = min(shaken, SHAKES // 2)
        path = trial if now <= cost * 1.02 else best
    return _keys(best, scorer.count)


def _keys(path: Ints, count: int) -> Floats:
    return keys_of(tuple(Stage(node, 0, 1) for node in path.tolist()), count)
