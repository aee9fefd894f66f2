"""How others cut a model: the rules that our plans are compared with, and start from.

Each takes the problem and returns a chain, or None where the rule asks more of a node's memory than it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from bsns.core.blocks import BlockRange
from bsns.planning.chain_dp import Ruler, least_bottleneck
from bsns.planning.joining import choose_range, equal_split
from bsns.planning.problem import Chain, ChainProblem, Stage

Rule = Callable[[ChainProblem], Chain | None]


def equal(problem: ChainProblem) -> Chain | None:
    """The same number of blocks for everybody, in the snapshot's order; who has no room for its share is left out."""
    nodes = list(range(problem.node_count))
    while nodes:
        parts = min(len(nodes), problem.block_count)
        ranges = equal_split(problem.block_count, parts)
        chain = tuple(Stage(node, part.start, part.end) for node, part in zip(nodes, ranges, strict=False))
        small = {node for node, start, end in chain if problem.bytes_L[start:end].sum() > problem.memory_N[node]}
        if not small:
            return chain
        nodes = [node for node in nodes if node not in small]
    return None


def by_memory(problem: ChainProblem) -> Chain | None:
    """Blocks in proportion to memory, the largest node first: exo's ring partition."""
    order = np.argsort(-problem.memory_N, kind="stable")
    share = np.cumsum(problem.memory_N[order])
    if share[-1] <= 0:
        return None
    ends = np.rint(share / share[-1] * problem.block_count).astype(int)
    starts = np.concatenate([[0], ends[:-1]])
    chain = tuple(
        Stage(int(node), int(start), int(end))
        for node, start, end in zip(order, starts, ends, strict=True)
        if start < end
    )
    return chain if problem.fits(chain) else None


def petals(problem: ChainProblem) -> Chain | None:
    """Nodes join one by one where the swarm is weakest, and tokens take the fastest route over what they hold.

    The joining and the routing rule of Petals (arXiv 2312.08361, §3.2); None where the nodes leave a gap.
    """
    held: list[tuple[int, BlockRange]] = []
    for node in range(problem.node_count):
        room = _room(problem, node)
        if room:
            holders = [(blocks, 1 / float(problem.time_N[other])) for other, blocks in held]
            held.append((node, choose_range(problem.block_count, holders, room)))
    return _fastest_route(problem, held)


def by_speed(problem: ChainProblem) -> Chain | None:
    """The fastest nodes first, cut for throughput by dynamic programming: Parallax's idea.

    Of the orders made of the k fastest nodes the best; the cut may skip nodes, which covers every k.
    """
    return least_bottleneck(problem, [int(node) for node in np.argsort(problem.time_N, kind="stable")])


RULES: Mapping[str, Rule] = MappingProxyType(
    {"equal split": equal, "by memory (exo)": by_memory, "joining (Petals)": petals, "by speed (Parallax)": by_speed}
)


def _room(problem: ChainProblem, node: int) -> int:
    """The most neighbouring blocks that fit a node wherever they begin."""
    ruler = Ruler.of(problem)
    sums_M = ruler.bytes_M
    ends = np.searchsorted(sums_M, sums_M + problem.memory_N[node], side="right") - 1
    short = np.flatnonzero(ends < problem.block_count)  # from later starts everything to the end fits
    return int((ends[short] - short).min()) if len(short) else problem.block_count


def _fastest_route(problem: ChainProblem, held: list[tuple[int, BlockRange]]) -> Chain | None:
    """The chain of least latency over held ranges, block by block: a node goes on, or hands over to another.

    It comes back to no node it has left: of two ways to the same node and block the faster is kept.
    """
    if not held:
        return None
    nodes = np.array([node for node, _ in held])
    count = len(nodes)
    holds_KL = np.zeros((count, problem.block_count), dtype=bool)
    for row, (_, blocks) in enumerate(held):
        holds_KL[row, blocks.start : blocks.end] = True
    hop_KK = problem.hop_NN[np.ix_(nodes, nodes)]
    step_K = problem.time_N[nodes]
    cost_K = np.where(holds_KL[:, 0], problem.entry_N[nodes] + problem.work_L[0] * step_K, math.inf)
    been_KK = np.eye(count, dtype=bool)
    before = np.empty((problem.block_count, count), dtype=np.int64)
    before[0] = -1
    for block in range(1, problem.block_count):
        ways_KK = np.where(been_KK, math.inf, cost_K[:, None] + hop_KK)
        np.fill_diagonal(ways_KK, cost_K)
        before[block] = ways_KK.argmin(axis=0)
        cost_K = np.where(holds_KL[:, block], ways_KK.min(axis=0) + problem.work_L[block] * step_K, math.inf)
        been_KK = been_KK[before[block]] | np.eye(count, dtype=bool)
    last = int((cost_K + problem.exit_N[nodes]).argmin())
    if not math.isfinite(cost_K[last]):
        return None
    stages: list[Stage] = []
    end = problem.block_count
    for block in range(problem.block_count - 1, -1, -1):
        previous = int(before[block, last])
        if previous != last:
            stages.append(Stage(int(nodes[last]), block, end))
            last, end = previous, block
    return tuple(reversed(stages))
