"""Plans by weights: the third decoder of planning.brkga, whose keys are the weights of the selection heuristic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.brkga import Decode, Evolved, Floats, Settings, evolve
from bsns.planning.problem import Chain, ChainProblem
from bsns.planning.selection import Weights, select

KEYS = ("work", "latency", "memory", "lookahead")
"""The weights that a plan's cost can depend on, a key each."""


class Weighed(NamedTuple):
    """The best weights of a run, the chain they pick, and how the engine came to them."""

    weights: Weights
    chain: Chain
    evolved: Evolved


def decode_weights(problem: ChainProblem, objective: Objective) -> Decode:
    """Costs of what the selection picks by each row of keys; inf where it comes to a dead end.

    A completion may come back to a node here (`max_cases` is 0): many plans are looked at, each of them quickly.
    """

    def decode(keys_PK: Floats) -> Floats:
        costs = np.full(len(keys_PK), np.inf)
        for number, keys_K in enumerate(keys_PK):
            chain = chain_by(problem, weights_by(problem, keys_K))
            if chain is not None:
                costs[number] = problem.value(chain, objective)
        return costs

    return decode


def best_by_weights(
    problem: ChainProblem,
    objective: Objective,
    rng: np.random.Generator,
    settings: Settings | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Weighed | None:
    """The best chain that any weights of the run pick, or None; never worse than by those of `fast`.

    Same rng, same result.
    """
    decode = decode_weights(problem, objective)
    warm_WK = default_keys()[None, :]
    evolved = evolve(decode, len(KEYS), rng=rng, settings=settings, warm=warm_WK, should_stop=should_stop)
    weights = weights_by(problem, evolved.keys)
    chain = chain_by(problem, weights)
    return None if chain is None else Weighed(weights, chain, evolved)


def default_keys() -> Floats:
    """The keys that stand for the weights of `fast`."""
    return np.array([0.5, 0.5, 0.0, 0.5])


def weights_by(problem: ChainProblem, keys_K: Floats) -> Weights:
    """A key k is the weight k / (1 − k), so that the half is 1; the memory's in times of the whole on a mean node."""
    work, latency, memory, lookahead = (float(key / (1 - key)) for key in np.minimum(keys_K, 1 - 1e-9))
    mean_s = float(problem.work_L.sum() * problem.time_N.mean())
    return Weights(work=max(work, 1e-9), latency=latency, memory=memory * mean_s, lookahead=lookahead)


def chain_by(problem: ChainProblem, weights: Weights) -> Chain | None:
    """What the selection picks by these weights, as the decoder does."""
    return select(problem, weights, max_cases=0)
