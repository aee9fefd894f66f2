"""The widest chain: the one whose slowest stage is fastest, and of those the one that takes a token least time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bsns.planning.problem import Chain, Stage
from bsns.planning.walks import MAX_CASES, Bools, Cost, Ints, Limit, Table, Ways, cheapest_chain

EFFORT = 300_000
"""Cases times their size (blocks · nodes²) that the search may take."""
LEAST_CASES = 1
BEAM = 6
"""How many beginnings of a chain are kept at each block, in the search for one to begin with."""


def fastest_chain(ways: Ways, depth: int) -> tuple[Cost, Chain] | None:
    """The cheapest chain of at most `depth` stages, or None. Exact as cheapest_chain is."""
    found = cheapest_chain(ways)
    if found is None or len(found[1]) <= depth:
        return found
    return cheapest_chain(ways, solve=lambda allowed, least, most: _within(ways, allowed, depth).best(), max_cases=1)


def widest_chain(ways: Ways, depth: int) -> tuple[Cost, Chain] | None:
    """The chain of at most `depth` stages with the least (slowest stage or way back, latency), or None.

    A stage's time is its blocks' and the way in. Every block must cost a node the same. Which nodes share the work best
    is a hard question where many hold the same blocks: exact where the cases that EFFORT allows settle it.
    """
    size = ways.block_count * ways.node_count**2
    cases = max(LEAST_CASES, min(MAX_CASES, EFFORT // size))
    search = _Widest(ways)
    found = cheapest_chain(ways, solve=search.solve, cost=search.cost, known=search.thrifty(), max_cases=cases)
    if found is not None and len(found[1]) > depth:
        search = _Widest(ways, depth)
        found = cheapest_chain(ways, solve=search.solve, cost=search.cost, known=search.thrifty(), max_cases=1)
    return found


@dataclass(slots=True, eq=False)
class _Widest:
    """What the search asks: costs are (slowest stage or way back, latency). `depth` 0 leaves the stages uncounted."""

    ways: Ways
    depth: int = 0
    time_N: Ints = field(init=False)
    counting: Ways = field(init=False)
    """The same ways at no cost but one for each stage."""

    def __post_init__(self) -> None:
        ways = self.ways
        self.time_N = ways.cost_NL[:, 0]
        if (ways.cost_NL != self.time_N[:, None]).any():
            raise ValueError("the widest chain is searched over blocks that cost a node all the same")
        nothing_N = np.zeros_like(self.time_N)
        self.counting = ways
        if self.depth:
            self.counting = Ways(ways.cost_NL * 0, ways.hop_MN[:-1] * 0, nothing_N, nothing_N, ways.reach_NL)

    def cost(self, chain: Chain) -> Cost:
        ways, before = self.ways, self.ways.node_count
        slowest = int(ways.exit_N[chain[-1].node])
        for node, start, end in chain:
            slowest = max(slowest, int(ways.hop_MN[before, node] + (end - start) * self.time_N[node]))
            before = node
        return slowest, ways.cost(chain)[0]

    def solve(self, allowed_NL: Bools, least: Cost | None, most: Cost | None) -> tuple[Cost, Chain] | None:
        """The least bound that walks can keep within, and of those the cheapest walk."""
        reach_NL = self.ways.reach_within(allowed_NL)
        low, high = least[0] if least else 0, most[0] if most else self._beyond()
        if not self._feasible(allowed_NL, reach_NL, high):
            return None
        if least and self._feasible(allowed_NL, reach_NL, low):
            high = low
        while low < high:  # over the times that stages can have
            middle = (low + high) // 2
            if self._feasible(allowed_NL, reach_NL, middle):
                high = self._neighbour(middle, up=False)
            else:
                low = self._neighbour(middle, up=True)
        table = self.ways.table(allowed_NL, self._limit(high)) if not self.depth else None
        found = (table or _within(self.ways, allowed_NL, self.depth, self._limit(high))).best()
        return found and ((high, found[0][0]), found[1])

    def thrifty(self) -> Chain | None:
        """A good chain to begin with, by beam search: the bound is narrowed until it is known to about a percent."""
        chain = self._beam(high := self._beyond())
        low = 0
        while chain is not None and low < 0.99 * high:
            high = min(high, self.cost(chain)[0])
            middle = (low + high) // 2
            better = self._beam(middle)
            if better is None:
                low = max(middle, 1)
            else:
                chain, high = better, middle
        return chain

    def _beam(self, bound: int) -> Chain | None:
        """A chain within the bound, each stage as long as may be; kept is what leaves most to be used later."""
        ways = self.ways
        limit = self._limit(bound)
        blocks, nodes = ways.block_count, ways.node_count
        left_NL = np.maximum(ways.reach_NL.max(axis=1)[:, None] - np.arange(blocks + 1), 0)
        later_NL = np.minimum(limit.longest_MN.max(axis=0)[:, None], left_NL)
        # at each block: what is left to use, who was last, who is unused, and the stages as links back
        beams: list[list[tuple[float, int, Bools, object]]] = [[] for _ in range(blocks + 1)]
        beams[0] = [(0.0, nodes, np.ones(nodes, np.bool_), None)]
        for block in range(blocks):
            beam = sorted(beams[block], key=lambda label: -label[0])[:BEAM]
            if not beam:
                continue
            unused_WN = np.array([label[2] for label in beam])
            ends_WN = np.minimum(block + limit.longest_MN[[label[1] for label in beam]], ways.reach_NL[:, block])
            worth_WL = unused_WN @ later_NL
            worth_WN = np.take_along_axis(worth_WL, ends_WN, axis=1) - later_NL[np.arange(nodes), ends_WN]
            for which, node in np.argwhere(unused_WN & (ends_WN > block)).tolist():
                end = int(ends_WN[which, node])
                if end == blocks and not limit.last_N[node]:
                    continue
                _, _, unused_N, stages = beam[which]
                unused_N = unused_N.copy()
                unused_N[node] = False
                beams[end].append((int(worth_WN[which, node]), node, unused_N, (Stage(node, block, end), stages)))
        chains = (_unlinked(label[3]) for label in beams[blocks])
        return next((chain for chain in chains if not self.depth or len(chain) <= self.depth), None)

    def _beyond(self) -> int:
        """A bound that everything keeps within."""
        ways = self.ways
        farthest = max(ways.hop_MN.max(initial=0), ways.exit_N.max(initial=0))
        return int(farthest + ways.block_count * self.time_N.max(initial=0))

    def _limit(self, bound: int) -> Limit:
        left_MN = bound - self.ways.hop_MN
        blocks_MN = np.where(self.time_N > 0, left_MN // np.maximum(self.time_N, 1), self.ways.block_count)
        longest_MN = np.where(left_MN >= 0, np.minimum(blocks_MN, self.ways.block_count), 0)
        np.fill_diagonal(longest_MN[:-1], 0)
        return Limit(longest_MN, self.ways.exit_N <= bound)

    def _neighbour(self, bound: int, *, up: bool) -> int:
        """The greatest time within the bound that a stage or a way back can have, or the least beyond it."""
        ways, time_N = self.ways, self.time_N
        blocks_MN = np.maximum((bound - ways.hop_MN) // np.maximum(time_N, 1) + up, 1)
        times = np.concatenate([(ways.hop_MN + blocks_MN * time_N).ravel(), ways.hop_MN.ravel(), ways.exit_N])
        return int(times[times > bound].min()) if up else int(times[times <= bound].max())

    def _feasible(self, allowed_NL: Bools, reach_NL: Ints, bound: int) -> bool:
        limit = self._limit(bound)
        if not _enough(reach_NL, limit) or not _reaches(self.ways, reach_NL, limit):
            return False
        return not self.depth or int(self.counting.table(allowed_NL, limit).cost_LM[0, -1]) <= self.depth


def _unlinked(link: object) -> Chain:
    stages: list[Stage] = []
    while isinstance(link, tuple):
        stages.append(link[0])
        link = link[1]
    return tuple(reversed(stages))


def _within(ways: Ways, allowed_NL: Bools, depth: int, limit: Limit | None = None) -> Table:
    """The table of completions with at most `depth` stages."""
    table = ways.table(np.zeros_like(allowed_NL), limit)
    for _ in range(depth):
        table = ways.table(allowed_NL, limit, after=table)
    return table


def _enough(reach_NL: Ints, limit: Limit) -> bool:
    """Whether between any two blocks there is enough that nodes can do in one stage each: what walks do not see."""
    nodes, blocks = reach_NL.shape
    holds_NL = np.zeros((nodes, blocks + 1), np.int64)
    np.cumsum(reach_NL > np.arange(blocks), axis=1, out=holds_NL[:, 1:])
    changes = np.flatnonzero((np.diff(holds_NL, axis=1, n=2) != 0).any(axis=0)) + 1
    edges = np.concatenate([[0], changes, [blocks]])
    longest_N = limit.longest_MN.max(axis=0)
    for first, edge in enumerate(edges[:-1]):
        between_NE = np.minimum(holds_NL[:, edges[first + 1 :]] - holds_NL[:, [edge]], longest_N[:, None])
        if (between_NE.sum(axis=0) < edges[first + 1 :] - edge).any():
            return False
    return True


def _reaches(ways: Ways, reach_NL: Ints, limit: Limit) -> bool:
    """Whether any walk keeps within the limit."""
    blocks, nodes = ways.block_count, ways.node_count
    done_M = np.append(limit.last_N, False)
    nearest_N = np.full(nodes, 2 * blocks)  # the nearest end of a stage after which the node's walk can be completed
    for block in range(blocks - 1, -1, -1):
        nearest_N[done_M[:nodes]] = block + 1
        who, rows = ways.begin[block], ways.ended[block]
        near = nearest_N[who]
        within = (near <= reach_NL[who, block]) & (limit.longest_MN[np.ix_(rows, who)] >= near - block)
        done_M = np.zeros(nodes + 1, np.bool_)
        done_M[rows] = within.any(axis=1)
    return bool(done_M[nodes])
