"""Walks: the cheapest way over blocks and nodes, and chains, which are the walks that use each node once.

Costs are whole numbers, so that equal ones compare equal whatever the order in which they were summed. Suffixes say the
axes: L blocks, N nodes, M nodes and after them the client, who stands before the first stage.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsns.planning.problem import Chain, Stage

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEVER = 2**60
"""The cost of what cannot be. Sums with it stay above half of it, which is how it is known."""
MAX_CASES = 200
"""How many cases to look at: beyond any real swarm's need, and a bound on what contrived records can cost."""

Cost = tuple[int, ...]
"""Compared in order. The cheapest walk's is (cost with stages counted in its lowest bits, fullest node's fullness)."""


class Limit(NamedTuple):
    """For stages that must keep within a time: how many blocks node n may take after m, and who may be the last."""

    longest_MN: Ints
    last_N: Bools


class Ways:
    """What walks cost. `reach_NL[n, s]` is the farthest end of a stage of n that begins at s; at most s if none may.

    Of equally cheap walks the one with fewer stages wins, then the one whose greatest `fullness_N` is least. Single
    costs beyond what fits the sums count as the greatest that does (some 28 s for 80 blocks, in picoseconds).
    """

    def __init__(
        self,
        cost_NL: Ints,
        hop_NN: Ints,
        entry_N: Ints,
        exit_N: Ints,
        reach_NL: Ints,
        fullness_N: Ints | None = None,
    ) -> None:
        self.node_count, self.block_count = cost_NL.shape
        self.bits = self.block_count.bit_length()
        most = (NEVER // 2 >> self.bits) // (2 * self.block_count + 2)
        self.cost_NL = np.clip(cost_NL, -most, most)
        self.hop_MN = np.clip(np.vstack([hop_NN, entry_N]), -most, most)
        self.exit_N = np.clip(exit_N, -most, most)
        self.reach_NL = np.minimum(reach_NL, self.block_count)
        self.fullness_N = np.zeros(self.node_count, np.int64) if fullness_N is None else fullness_N
        self.ties = bool(self.fullness_N.any())
        self._sums_LN = np.zeros((self.block_count + 1, self.node_count), np.int64)
        np.cumsum(self.cost_NL.T << self.bits, axis=0, out=self._sums_LN[1:])
        self._hop_MN = (self.hop_MN << self.bits) + 1
        np.fill_diagonal(self._hop_MN[: self.node_count], NEVER)  # a stage does not follow itself
        self._exit_N = self.exit_N << self.bits
        # For each block: who may begin a stage there, who may have ended one (and the client), and the ways between.
        blocks = np.arange(self.block_count)
        self.begin = [np.flatnonzero(self.reach_NL[:, block] > block) for block in blocks]
        holds_NL = self.reach_NL > blocks
        ended = [
            np.append(np.flatnonzero(holds_NL[:, block - 1]) if block else [], self.node_count) for block in blocks
        ]
        self.ended = [rows.astype(np.intp) for rows in ended]
        self._between = [self._hop_MN[np.ix_(a, b)] for a, b in zip(self.ended, self.begin, strict=True)]

    def everything(self) -> Bools:
        """Every node at every block, for a case to narrow."""
        return np.ones((self.node_count, self.block_count), np.bool_)

    def table(
        self, allowed_NL: Bools, limit: Limit | None = None, *, after: Table | None = None, start: int = 0
    ) -> Table:
        """The cheapest completions from every block on from `start`, of nodes at the blocks they are allowed.

        With `after`, a stage is followed by one of that table's completions: so the number of stages is counted.
        """
        blocks, nodes = self.block_count, self.node_count
        cost_LM = np.full((blocks + 1, nodes + 1), NEVER, np.int64)
        full_LM = np.full((blocks + 1, nodes + 1), -NEVER, np.int64)
        cost_LM[blocks, :nodes] = self._exit_N if limit is None else np.where(limit.last_N, self._exit_N, NEVER)
        table = Table(self, cost_LM, full_LM, self.reach_within(allowed_NL), limit, after)
        source = table.source
        # What the stage's blocks cost is a difference of two sums, of which this holds the first.
        total_LN = source.cost_LM[:, :nodes] + self._sums_LN
        ends = np.arange(blocks + 1)
        for block in range(blocks - 1, start - 1, -1):
            who = self.begin[block]
            reach = table.reach_NL[who, block]
            top = int(reach.max(initial=0))
            if top > block:
                window = total_LN[block + 1 : top + 1][:, who]
                window = np.where(ends[block + 1 : top + 1, None] <= reach, window, NEVER + NEVER // 2)
                rows = self.ended[block]
                if limit is None:
                    nearest = window.min(axis=0)
                    ways = self._between[block] + (nearest - self._sums_LN[block, who])
                else:
                    longest = np.minimum(limit.longest_MN[np.ix_(rows, who)], top - block)
                    running = np.minimum.accumulate(window, axis=0)
                    nearest = running[np.maximum(longest, 1) - 1, np.arange(len(who))]
                    ways = self._between[block] + (nearest - self._sums_LN[block, who])
                    ways = np.where(longest > 0, ways, NEVER)
                best = ways.min(axis=1)
                cost_LM[block, rows] = np.where(best < NEVER // 2, best, NEVER)
                if self.ties and limit is None:
                    full = np.where(window == nearest, source.full_LM[block + 1 : top + 1][:, who], NEVER).min(axis=0)
                    full = np.maximum(full, self.fullness_N[who])
                    full_LM[block, rows] = np.where(ways == best[:, None], full, NEVER).min(axis=1)
            if after is None:
                total_LN[block] = cost_LM[block, :nodes] + self._sums_LN[block]
        return table

    def reach_within(self, allowed_NL: Bools) -> Ints:
        """`reach_NL`, stopped at the first block that is not allowed."""
        forbidden_NL = np.where(allowed_NL, self.block_count, np.arange(self.block_count))
        return np.minimum(self.reach_NL, np.minimum.accumulate(forbidden_NL[:, ::-1], axis=1)[:, ::-1])

    def stage_costs(self, before: int, block: int, reach_NL: Ints) -> Ints:
        """(ends, N): what each stage after node `before` costs that begins at `block`, way in included, or NEVER."""
        ends = np.arange(block + 1, self.block_count + 1)[:, None]
        costs = self._sums_LN[block + 1 :] - self._sums_LN[block] + self._hop_MN[before]
        return np.where((ends <= reach_NL[:, block]) & (costs < NEVER // 2), costs, NEVER)

    def cost(self, chain: Chain, before: int | None = None) -> Cost:
        """A chain's cost, after node `before` or from the client, as the cheapest walk's is given."""
        total, before = 0, self.node_count if before is None else before
        for node, start, end in chain:
            total += int(self._hop_MN[before, node] + self._sums_LN[end, node] - self._sums_LN[start, node])
            before = node
        fullest = max(int(self.fullness_N[stage.node]) for stage in chain) if self.ties else 0
        return total + int(self._exit_N[before]), fullest

    def splits(self, walk: Chain, allowed_NL: Bools) -> list[Bools] | None:
        """Cases without this walk that together hold every chain among those allowed; None if it is a chain itself.

        Around the first block after a node that the walk comes back to, the node works only before it, only after it,
        or is the one that computes it.
        """
        left: dict[int, int] = {}
        for node, _, end in walk:
            if node in left:
                gap = left[node]
                before, after, at = allowed_NL.copy(), allowed_NL.copy(), allowed_NL.copy()
                before[node, gap:] = False
                after[node, : gap + 1] = False
                at[:node, gap] = at[node + 1 :, gap] = False
                return [before, after, at]
            left[node] = end
        return None

    def straightened(self, walk: Chain) -> Chain | None:
        """A chain made of a walk: a node it comes back to keeps what lies between, if it may."""
        straight: list[Stage] = []
        reached = 0
        for node, start, end in walk:
            if start >= reached:
                reached = max([end, *(stage.end for stage in walk if stage.node == node)])
                if reached > self.reach_NL[node, start]:
                    return None
                straight.append(Stage(node, start, reached))
        return tuple(straight)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """`cost_LM[s, m]`: the cheapest completion of blocks s and on after node m, or for the client, of the whole."""

    ways: Ways
    cost_LM: Ints
    full_LM: Ints
    reach_NL: Ints
    limit: Limit | None
    after: Table | None

    @property
    def source(self) -> Table:
        """Where a stage's completion stands."""
        return self if self.after is None else self.after

    def best(self, block: int = 0, before: int | None = None) -> tuple[Cost, Chain] | None:
        """The cheapest walk over the blocks from `block` on after node `before`, or the client, if there is one."""
        ways = self.ways
        before = ways.node_count if before is None else before
        total = int(self.cost_LM[block, before])
        if total >= NEVER // 2:
            return None
        full = int(self.full_LM[block, before]) if ways.ties and self.limit is None else 0
        return (total, full), self.walk(block, before)

    def walk(self, block: int, before: int) -> Chain:
        """The cheapest completion itself; `cost_LM` must say that there is one."""
        ways, table, stages = self.ways, self, list[Stage]()
        while block < ways.block_count:
            source = table.source
            costs = ways.stage_costs(before, block, table.reach_NL) + source.cost_LM[block + 1 :, : ways.node_count]
            if self.limit is not None:
                lengths = np.arange(1, len(costs) + 1)[:, None]
                costs = np.where(lengths <= self.limit.longest_MN[before], costs, NEVER)
            full = np.maximum(source.full_LM[block + 1 :, : ways.node_count], ways.fullness_N)
            least = costs == costs.min()
            end, node = np.unravel_index(np.argmin(np.where(least, full, NEVER)), costs.shape)
            stages.append(Stage(int(node), block, block + 1 + int(end)))
            block, before, table = block + 1 + int(end), int(node), source
        return tuple(stages)


Solve = Callable[[Bools, Cost | None, Cost | None], tuple[Cost, Chain] | None]
"""The cheapest walk among those allowed, or None if there is none, or none cheaper than the second cost given.

The first is one that no walk here can fall below.
"""


def cheapest_chain(
    ways: Ways,
    *,
    allowed_NL: Bools | None = None,
    solve: Solve | None = None,
    cost: Callable[[Chain], Cost] | None = None,
    before: int | None = None,
    known: Chain | None = None,
    max_cases: int = MAX_CASES,
) -> tuple[Cost, Chain] | None:
    """The cheapest walk that uses each node once, or None. `solve` and `cost` say what is cheap, if not `ways` itself.

    `before` is whom the walks of `solve` come after, if not the client; `known` a chain to do better than.

    A walk may come back to a node it has left, as that is faster for the blocks between. So the cheapest walk is split
    into cases until one is a chain. Exact, unless so many cases do not settle it; then the best chain found.
    """
    solve = solve or (lambda allowed, least, most: ways.table(allowed).best())
    cost = cost or (lambda chain: ways.cost(chain, before))
    whole = ways.everything() if allowed_NL is None else allowed_NL
    best = None if known is None else (cost(known), known)
    first = solve(whole, None, best and best[0])
    if first is None:
        return best
    order = count()
    cases = [(first[0], next(order), first[1], whole)]
    while cases:
        least, number, walk, allowed = heapq.heappop(cases)
        straight = ways.straightened(walk)
        if straight is not None and (best is None or cost(straight) < best[0]):
            best = cost(straight), straight
        if number > max_cases or (best is not None and least >= best[0]):
            break
        for narrowed in ways.splits(walk, allowed) or ():
            case = solve(narrowed, least, best and best[0])
            if case is not None:
                heapq.heappush(cases, (case[0], next(order), case[1], narrowed))
    return best or _dive(first[1], whole, ways, solve)


def _dive(walk: Chain, allowed_NL: Bools, ways: Ways, solve: Solve) -> tuple[Cost, Chain] | None:
    """A chain by taking the cheapest case of each split, where nothing else was found."""
    while (splits := ways.splits(walk, allowed_NL)) is not None:
        found = [(case, narrowed) for narrowed in splits if (case := solve(narrowed, None, None)) is not None]
        if not found:
            return None
        (cost, walk), allowed_NL = min(found, key=lambda entry: entry[0][0])
    return cost, walk
