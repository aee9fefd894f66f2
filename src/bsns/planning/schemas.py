"""Schemas: plans made beforehand for swarms of many shapes, to begin from when a swarm like one of them turns up.

A schema holds what its swarm was like and its plan as roles. At run time the few most alike are cast with the nodes at
hand and re-scored with the true costs; the best is taken, refined, or given up for a fresh search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bsns.core.errors import BadOption, BadSnapshot, NotEnoughMemory
from bsns.core.ids import ModelId
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.core.words import several
from bsns.planning.bounds import bottleneck_floor, latency_floor, lower_bound
from bsns.planning.likeness import Key, Likeness, likeness, nearest
from bsns.planning.network import Network
from bsns.planning.planner import Clock, solve_chain
from bsns.planning.problem import Chain, ChainProblem
from bsns.planning.scale import DENSE_NODES, candidates
from bsns.planning.transfer import Role, roles_of, transferred

GOOD_GAP = 0.02
"""A plan this near the lower bound is taken as it is: no search could gain more."""
REFINE_SHARE = 0.3
"""Of the time that is left, for refining, before a fresh search may have the rest."""

How = Literal["taken", "refined", "fresh"]


@dataclass(frozen=True, slots=True)
class Schema:
    """What a swarm was like, and its plan as roles. Its value is that of the objective it was planned for."""

    like: Likeness
    node_count: int
    roles: tuple[Role, ...]
    value_s: float


@dataclass(frozen=True, slots=True)
class Library:
    """The schemas of one model. `skipped` swarms had too little memory for it."""

    model: ModelId
    model_name: str
    block_count: int
    objective: Objective
    schemas: tuple[Schema, ...]
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The chain found, in the numbers of `problem`, how, and its proof.

    `schema` is the number of the one it came from, None after a fresh search; `scored` has those of the schemas looked
    at whose plan fits here, with its value, the best first.
    """

    problem: ChainProblem
    chain: Chain
    value_s: float
    lower_bound_s: float
    how: How
    schema: int | None
    scored: tuple[tuple[int, float], ...]

    @property
    def gap(self) -> float:
        return self.value_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else math.inf


def build(
    shape: ModelShape,
    snapshots: Iterable[Snapshot],
    *,
    objective: Objective,
    rng: np.random.Generator,
    clock: Callable[[], Clock],
    cache_tokens: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Library:
    """Solve the model for each swarm, with a new clock for each; those with too little memory are skipped and counted.

    Raises BadSnapshot, and NotEnoughMemory where that would be all of them.
    """
    schemas: list[Schema] = []
    skipped = 0
    for number, snapshot in enumerate(snapshots):
        told(number)
        problem = problem_of(snapshot, shape, cache_tokens=cache_tokens)
        try:
            solved = solve_chain(problem, objective, rng=rng, remaining_s=clock())
        except NotEnoughMemory:
            skipped += 1
            continue
        like = likeness(snapshot, shape)
        schemas.append(Schema(like, len(snapshot.nodes), roles_of(problem, solved.chain), solved.value))
    if skipped and not schemas:
        where = "does not fit the swarm" if skipped == 1 else f"fits none of the {skipped} swarms"
        raise NotEnoughMemory(
            f"{shape.name} {where}, so there is no schema to keep; give swarms with more memory, or ask for fewer "
            "cache tokens"
        )
    return Library(shape.model, shape.name, shape.block_count, objective, tuple(schemas), skipped)


def score(
    library: Library,
    snapshot: Snapshot,
    problem: ChainProblem,
    shape: ModelShape,
    objective: Objective,
    m: int,
    rng: np.random.Generator,
    *,
    key: Key = "ph",
) -> list[tuple[float, int, Chain]]:
    """The `m` nearest schemas' plans with this swarm's nodes: (true value, schema, chain), the best first.

    Those that do not fit are left out. Raises BadSnapshot for a library of another model.
    """
    if library.block_count != shape.block_count:
        raise BadSnapshot(
            f"the schema library was built for {library.model_name} with {several(library.block_count, 'block')}, but "
            f"{shape.name}, which is to be planned, has {several(shape.block_count, 'block')}; build a library for it "
            "with bsns schemas build"
        )
    if m < 1:
        raise BadOption(f"look at {m} schemas? at least 1")
    like = likeness(snapshot, shape)
    found: list[tuple[float, int, Chain]] = []
    for number in nearest(key, like, [schema.like for schema in library.schemas], m, rng):
        chain = transferred(problem, library.schemas[number].roles, objective)
        if chain is not None:
            found.append((problem.value(chain, objective), number, chain))
    return sorted(found)


def lookup(
    library: Library,
    snapshot: Snapshot,
    shape: ModelShape,
    objective: Objective,
    m: int,
    rng: np.random.Generator,
    remaining_s: Clock,
    max_gap: float,
    *,
    key: Key = "ph",
    cache_tokens: int = 0,
    client_s: float = 0.0,
) -> Outcome:
    """A plan for this swarm by way of the library, the cheapest of three steps that is good enough.

    The best of the `m` nearest schemas is taken if it is within 2 % of the lower bound; else it is refined by a short
    search that starts from it; and if it then still is more than `max_gap` above the bound, or none fits, a fresh
    search has the rest of the time. Raises BadSnapshot, and NotEnoughMemory where no chain fits.
    """
    problem = problem_of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s)
    found = score(library, snapshot, problem, shape, objective, m, rng, key=key)
    bound_s = _bound(problem, snapshot, shape, objective, cache_tokens, client_s)
    whole = problem.node_count == len(snapshot.nodes)

    def outcome(how: How, value: float, chain: Chain, proven_s: float = 0.0) -> Outcome:
        # what is proven of some nodes does not hold for all of a large swarm
        least_s = min(max(bound_s, proven_s) if whole else bound_s, value)
        scored = tuple((number, worth) for worth, number, _ in found)
        return Outcome(problem, chain, value, least_s, how, None if how == "fresh" else found[0][1], scored)

    if not found:
        fresh = solve_chain(problem, objective, rng=rng, remaining_s=remaining_s)
        return outcome("fresh", fresh.value, fresh.chain, fresh.lower_bound_s)
    value, _, chain = found[0]
    if value <= bound_s * (1 + GOOD_GAP):
        return outcome("taken", value, chain)
    rest_s = remaining_s() * (1 - REFINE_SHARE)
    warm = [chain for _, _, chain in found]
    refined = solve_chain(
        problem, objective, rng=rng, remaining_s=lambda: remaining_s() - rest_s, warm=warm, engines=("brkga",)
    )
    near = outcome("refined", refined.value, refined.chain, refined.lower_bound_s)
    if near.value_s <= near.lower_bound_s * (1 + max_gap):
        return near
    fresh = solve_chain(problem, objective, rng=rng, remaining_s=remaining_s, warm=[refined.chain])
    better = fresh.value < refined.value
    return outcome("fresh" if better else "refined", fresh.value, fresh.chain, fresh.lower_bound_s)


def problem_of(snapshot: Snapshot, shape: ModelShape, *, cache_tokens: int = 0, client_s: float = 0.0) -> ChainProblem:
    """The chain problem of a swarm; of a large one with the nodes that are worth looking at. Raises BadSnapshot."""
    network = Network.of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s)
    return network.problem(candidates(network))


def _bound(
    problem: ChainProblem,
    snapshot: Snapshot,
    shape: ModelShape,
    objective: Objective,
    cache_tokens: int,
    client_s: float,
) -> float:
    """Below every plan of the whole swarm."""
    if len(snapshot.nodes) <= DENSE_NODES:
        return lower_bound(problem, objective)
    floors = Network.of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s).floors()
    return objective.value(bottleneck_floor(floors, replicas=False), latency_floor(floors))
