"""Transfer: a chain told as roles, so that another swarm's nodes can play them.

A role is what made its node the right one for its range: how fast and how large it is and where it lies, each beside
the swarm's typical node, and how far it is to the next role. Suffixes: R roles, N nodes, B partial castings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsns.core.plan import Objective
from bsns.planning.chain_dp import best_cut
from bsns.planning.problem import Chain, ChainProblem, Floats

Ints = NDArray[np.int64]

BEAM = 24
"""Castings that are kept while roles are filled one after another."""
OTHERS = 64
"""Nodes without a role that the final cut may use as well."""
LEAST_S = 1e-7
BETTER, MEMORY, DISTANCE, SHORTAGE, HOP = 0.3, 0.25, 0.5, 4.0, 2.0
"""Weights against that of a node twice as slow as its role: twice as fast (a little, as others may need it more), half
as large, half or twice as far from all, unable to hold its range, and a typical distance too far from the one before.
Chosen on synthetic swarms: counting hops and speeds that are better than the role's as faults, too, nearly doubled the
regret."""


@dataclass(frozen=True, slots=True)
class Role:
    """Ratios to the swarm's median node or typical distance. `next_hop` leads to the following role; the last has 0."""

    start: int
    end: int
    time: float
    memory: float
    distance: float
    """The mean of its distances to all other nodes."""
    next_hop: float


def roles_of(problem: ChainProblem, chain: Chain) -> tuple[Role, ...]:
    """The chain's stages as roles."""
    time_N, memory_N, distance_N, scale_s = _ratios(problem)
    followers = [*(stage.node for stage in chain[1:]), None]
    return tuple(
        Role(
            stage.start,
            stage.end,
            float(time_N[stage.node]),
            float(memory_N[stage.node]),
            float(distance_N[stage.node]),
            0.0 if then is None else float(problem.hop_NN[stage.node, then] / scale_s),
        )
        for stage, then in zip(chain, followers, strict=True)
    )


def cast(problem: ChainProblem, roles: tuple[Role, ...]) -> list[int]:
    """Nodes for the roles, in their order, each once: those that fall least short of them. Fewer if there are too few.

    Beam search along the chain, so that also the hops between neighbouring roles are matched.
    """
    time_N, memory_N, distance_N, scale_s = _ratios(problem)
    bytes_L = np.concatenate([[0.0], np.cumsum(problem.bytes_L)])
    hop_NN = problem.hop_NN / scale_s
    taken_BN = np.zeros((1, problem.node_count), dtype=bool)
    nodes_BR = np.zeros((1, 0), dtype=np.int64)
    cost_B = np.zeros(1)
    before: Role | None = None
    for role in roles[: problem.node_count]:
        need = bytes_L[role.end] - bytes_L[role.start]
        shortage_N = np.maximum(1.0 - problem.memory_N / need, 0.0) if need > 0 else np.zeros_like(time_N)
        slower_N = np.log2(time_N / role.time)
        unlike_N = (
            np.where(slower_N > 0, slower_N, -BETTER * slower_N)
            + MEMORY * np.maximum(np.log2(role.memory / memory_N), 0.0)
            + DISTANCE * np.abs(np.log2(distance_N / role.distance))
            + SHORTAGE * shortage_N
        )
        cost_BN = cost_B[:, None] + unlike_N
        if before is not None:
            cost_BN = cost_BN + HOP * np.maximum(hop_NN[nodes_BR[:, -1]] - before.next_hop, 0.0)
        cost_BN = np.where(taken_BN, np.inf, cost_BN)
        kept = np.argsort(cost_BN, axis=None, kind="stable")[:BEAM]
        kept = kept[np.isfinite(cost_BN.ravel()[kept])]
        row_B, node_B = np.unravel_index(kept, cost_BN.shape)
        taken_BN = taken_BN[row_B]
        taken_BN[np.arange(len(kept)), node_B] = True
        nodes_BR = np.column_stack([nodes_BR[row_B], node_B])
        cost_B = cost_BN[row_B, node_B]
        before = role
    return [int(node) for node in nodes_BR[0]]


def transferred(problem: ChainProblem, roles: tuple[Role, ...], objective: Objective) -> Chain | None:
    """The best chain along the nodes that play the roles, or None if memory is too short.

    Nodes without a role stand beside the one they are nearest to, and the exact cut may take them too.
    """
    return best_cut(problem, with_others(problem, cast(problem, roles)), objective)


def with_others(problem: ChainProblem, order: list[int]) -> list[int]:
    """The order with further nodes, the fastest ones, each where it lengthens the way least."""
    others = np.setdiff1d(np.arange(problem.node_count), order)
    others = others[np.argsort(problem.time_N[others], kind="stable")][:OTHERS]
    hop_NN = problem.hop_NN
    for node in others:
        at = np.array(order, dtype=np.int64)
        if not len(at):
            order = [int(node)]
            continue
        inner = hop_NN[at[:-1], node] + hop_NN[node, at[1:]] - hop_NN[at[:-1], at[1:]]
        first = problem.entry_N[node] + hop_NN[node, at[0]] - problem.entry_N[at[0]]
        last = hop_NN[at[-1], node] + problem.exit_N[node] - problem.exit_N[at[-1]]
        place = int(np.argmin(np.concatenate([[first], inner, [last]])))
        order = [*order[:place], int(node), *order[place:]]
    return order


def _ratios(problem: ChainProblem) -> tuple[Floats, Floats, Floats, float]:
    """Times, memories and mean distances beside their medians, and the typical distance in seconds."""
    count = problem.node_count
    apart_s = problem.hop_NN[~np.eye(count, dtype=bool)]
    scale_s = max(float(np.median(apart_s)) if len(apart_s) else LEAST_S, LEAST_S)
    mean_N = problem.hop_NN.sum(axis=1) / max(count - 1, 1)
    return (
        problem.time_N / float(np.median(problem.time_N)),
        np.maximum(problem.memory_N / max(float(np.median(problem.memory_N)), 1.0), 1e-3),
        np.maximum(mean_N / scale_s, 1e-3),
        scale_s,
    )
