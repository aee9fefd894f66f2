"""BRKGA: a biased random-key genetic algorithm (Gonçalves & Resende, J. Heuristics 17, 2011), for all decoders.

A chromosome is a row of keys in [0, 1). Whoever uses the engine says what keys mean by decoding a whole population at
once. A generation keeps its elite, takes some new mutants, and mates the rest: a child has each key of its elite parent
with probability `inherit`. A child that somebody equals already gives way to a mutant: once the elite resemble each
other, copies would otherwise fill the population (a seventh of all children, on a tour of twelve towns).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import BadOption

Floats = NDArray[np.float64]
Decode = Callable[[Floats], Floats]
"""Costs (P,) of a population's keys (P, K); inf for what cannot be. Deterministic: equal keys, equal costs."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of a run. The shares are those the authors recommend."""

    population: int = 100
    generations: int = 100
    elite: float = 0.2
    mutants: float = 0.15
    inherit: float = 0.7

    def __post_init__(self) -> None:
        if self.population < 2 or self.generations < 1:
            raise BadOption(f"a population of {self.population} over {self.generations} generations cannot evolve")
        if not (self.elite > 0 and self.mutants >= 0 and self.elite + self.mutants < 1 and 0.5 <= self.inherit <= 1):
            raise BadOption("the shares of elite and mutants must leave room for children; inherit is 0.5 to 1")


@dataclass(frozen=True, slots=True)
class Evolved:
    """The best chromosome of a run, its cost, and the best cost after the first population and each generation."""

    keys: Floats
    cost: float
    history: tuple[float, ...]


def evolve(
    decode: Decode,
    keys: int,
    *,
    rng: np.random.Generator,
    settings: Settings | None = None,
    warm: Floats | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evolved:
    """The best keys found within the budget, or when `should_stop` says so after any generation.

    `warm` (W, keys) enters the first population, so the result is never worse than its best. Same rng, same result.
    """
    settings = settings or Settings()
    size = settings.population
    elite = max(1, round(size * settings.elite))
    mutants = round(size * settings.mutants)
    population_PK = rng.random((size, keys))
    if warm is not None and len(warm):
        kept = np.clip(warm[:size], 0.0, np.nextafter(1.0, 0.0))
        population_PK[: len(kept)] = kept
    cost_P = decode(population_PK)
    history = [float(cost_P.min())]
    for _ in range(settings.generations - 1):
        if should_stop():
            break
        order_P = np.argsort(cost_P, kind="stable")
        elite_EK = population_PK[order_P[:elite]]
        elite_cost_E = cost_P[order_P[:elite]]
        children = size - elite - mutants
        fathers_CK = elite_EK[rng.integers(elite, size=children)]
        mothers_CK = population_PK[order_P[rng.integers(elite, size, size=children)]]
        children_CK = np.where(rng.random((children, keys)) < settings.inherit, fathers_CK, mothers_CK)
        fresh_FK = np.concatenate([children_CK, rng.random((mutants, keys))])
        copies = _copies(population_PK, fresh_FK)
        fresh_FK[copies] = rng.random((len(copies), keys))
        population_PK = np.concatenate([elite_EK, fresh_FK])
        cost_P = np.concatenate([elite_cost_E, decode(fresh_FK)])
        history.append(float(cost_P.min()))
    best = int(np.argmin(cost_P))
    return Evolved(population_PK[best].copy(), float(cost_P[best]), tuple(history))


def _copies(population_PK: Floats, fresh_FK: Floats) -> list[int]:
    """Which of the fresh equal somebody in the population, or a fresh one before."""
    seen = {row_K.tobytes() for row_K in population_PK}
    copies = []
    for number, row_K in enumerate(fresh_FK):
        if row_K.tobytes() in seen:
            copies.append(number)
        seen.add(row_K.tobytes())
    return copies
