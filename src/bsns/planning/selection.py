"""Selection: nodes picked one after another by a user's own weights, each with a look ahead at how the rest can go.

n_i = argmin over feasible n of H(n | n_1 … n_{i−1}), in seconds, where n comes with the range it would take:
H = work · its work / speed + latency · way in + memory · pressure + reputation · (1 − reputation) + price · price
  + lookahead · cheapest completion of what remains.

The completion is weighed by the same terms. So with `lookahead` 1 and exact completions the chain is the cheapest by
these weights, and with those of `fast` the shortest. Completions are exact while a bounded number of splits settles
them (planning.walks), which it does among nodes that hold their ranges; where nodes would have to load theirs and their
memory is short, it often does not. So plans (planner.plan_by_weights) look for the cheapest chain itself, and say
whether it is proven.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.core.snapshot import NodeView
from bsns.planning.problem import Chain, ChainProblem, Floats, Stage
from bsns.planning.walks import MAX_CASES, NEVER, Bools, Cost, Ints, Table, Ways, cheapest_chain

MOST_WEIGHT = 1e12
LEAST_SHARE = 1e-13
"""Of what a whole chain costs: less than this a node's block does not cost it."""
_ATTESTED_ONLY = "attested-only"


@dataclass(frozen=True, slots=True)
class Weights:
    """What a user weighs a node by. Each says how many seconds per token one unit of its term is worth.

    Units: `memory` a chain of wholly full nodes, `reputation` a chain of nodes whose reputation is 0, `price` one unit
    of price per token. Raises BadOption for a weight that is negative, or no number, and if nothing is weighed.
    """

    work: float = 1.0
    latency: float = 1.0
    memory: float = 0.0
    reputation: float = 0.0
    price: float = 0.0
    lookahead: float = 1.0
    attested_only: bool = False
    """Whether nodes that have not proven what they run are left out."""

    def __post_init__(self) -> None:
        for name in TERMS:
            if not 0 <= getattr(self, name) <= MOST_WEIGHT:
                raise BadOption(f"the weight {name}={getattr(self, name)} is not between 0 and {MOST_WEIGHT:g}")
        if not any(getattr(self, name) for name in TERMS if name != "lookahead"):
            raise BadOption(f"nothing is weighed; give one of {', '.join(TERMS[:-1])} a weight above 0")

    @property
    def only_latency(self) -> bool:
        """Whether chains compare as their latencies do."""
        return self.work == self.latency and self.memory == self.reputation == self.price == 0

    @classmethod
    def parse(cls, text: str) -> Weights:
        """`cheap`, `latency=1,price=0.5`, or both: a named start (else `fast`) and what differs. Raises BadOption."""
        weights, changed = PRESETS["fast"], dict[str, Any]()
        named = ", ".join([*PRESETS, *(f"{term}=NUMBER" for term in TERMS)])
        for number, item in enumerate(text.split(",")):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals and name in PRESETS and number == 0:
                weights = PRESETS[name]
            elif not equals and name == _ATTESTED_ONLY:
                changed["attested_only"] = True
            elif equals and name in changed:
                raise BadOption(f"the weight {name} is given twice")
            elif equals and name in TERMS:
                changed[name] = _number(name, value)
            else:
                raise BadOption(f"{item[:32]!r} is no weight; use {named}, separated by commas")
        return replace(weights, **changed)


TERMS = tuple(field.name for field in fields(Weights) if field.name != "attested_only")
PRESETS = {
    "fast": Weights(),
    "cheap": Weights(price=1e6),  # the least price; of equal ones the fastest
    "trusted": Weights(reputation=10.0),  # a tenth of reputation is worth a second per token
    _ATTESTED_ONLY: Weights(attested_only=True),
}


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise BadOption(f"the weight {name}={value[:32]!r} is no number") from None


@dataclass(frozen=True, slots=True, eq=False)
class Traits:
    """What the weights look at beyond a chain problem's times: one entry per node of the problem."""

    price_N: Floats
    reputation_N: Floats
    attested_N: Bools
    fullness_N: Floats
    """How much of the cache is taken, 0 to 1."""

    @classmethod
    def of(cls, nodes: Sequence[NodeView]) -> Traits:
        """The traits of a snapshot's nodes, in the order of the problem's."""
        return cls(
            np.array([node.price for node in nodes], np.float64),
            np.array([node.reputation for node in nodes], np.float64),
            np.array([node.attested for node in nodes], np.bool_),
            np.array([1 - node.cache_tokens_left / node.cache_tokens if node.cache_tokens else 0.0 for node in nodes]),
        )

    def beside_the_best(self) -> Traits:
        """Without what even the best node costs, which every chain pays alike and which would drown differences."""
        price_N = self.price_N - self.price_N.min()
        return replace(self, price_N=price_N, reputation_N=self.reputation_N + (1 - self.reputation_N.max()))

    @classmethod
    def plain(cls, count: int) -> Traits:
        """Nodes that differ in nothing but their times."""
        return cls(np.zeros(count), np.ones(count), np.zeros(count, np.bool_), np.zeros(count))


def select(
    problem: ChainProblem,
    weights: Weights,
    *,
    traits: Traits | None = None,
    reach_NL: Ints | None = None,
    banned: Collection[PeerId] = (),
    max_cases: int = MAX_CASES,
) -> Chain | None:
    """The chain that the recursion picks, or None where it comes to a dead end.

    `reach_NL` says how far a node's stage may go from each block: `held_reach` where nodes hold their ranges, as far as
    its memory goes by default. A completion must use each node once, which is looked into for the picks about to be
    taken, by up to `max_cases` splits in all (planning.walks); beyond that it may come back to a node.
    """
    traits = traits or Traits.plain(problem.node_count)
    # Whoever holds a range has room for it; where nodes would have to load theirs, all of them together must have room.
    memory_N = problem.memory_N if reach_NL is None else np.full(problem.node_count, math.inf)
    reach_NL = fitting_reach(problem) if reach_NL is None else reach_NL.copy()
    out_N = np.array([peer in banned for peer in problem.peers]) | (weights.attested_only & ~traits.attested_N)
    reach_NL[out_N] = 0
    ways = weighted_ways(problem, weights, traits, reach_NL)
    return _Picking(ways, weights.lookahead, memory_N, problem.bytes_L, max_cases).chain()


def held_reach(held: Sequence[Sequence[BlockRange]], block_count: int) -> Ints:
    """How far a stage may go within one of the ranges that its node holds: `reach_NL` of planning.walks."""
    reach_NL = np.zeros((len(held), block_count), np.int64)
    for node, ranges in enumerate(held):
        for blocks in ranges:
            inside = reach_NL[node, blocks.start : blocks.end]
            np.maximum(inside, min(blocks.end, block_count), out=inside)
    return reach_NL


def fitting_reach(problem: ChainProblem) -> Ints:
    """How far a stage may go before it no longer fits its node's memory: `reach_NL` of planning.walks."""
    sums = np.concatenate([[0.0], np.cumsum(problem.bytes_L)])
    limits_NL = problem.memory_N[:, None] + sums[None, :-1]
    reach_NL: Ints = np.searchsorted(sums, limits_NL, side="right").astype(np.int64) - 1
    return reach_NL


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """What chains cost by some weights: the terms of H without the lookahead, in seconds, none of them negative."""

    cost_NL: Floats
    """A block's on a node."""
    hop_NN: Floats
    entry_N: Floats
    exit_N: Floats

    @classmethod
    def of(cls, problem: ChainProblem, weights: Weights, traits: Traits) -> Weighed:
        share_L = np.full(problem.block_count, 1 / problem.block_count)
        with np.errstate(divide="ignore", invalid="ignore"):
            filled_NL = np.where(problem.bytes_L > 0, problem.bytes_L / problem.memory_N[:, None], 0.0)
        filled_NL = np.minimum(filled_NL, 1.0) + traits.fullness_N[:, None] * share_L
        return cls(
            weights.work * problem.work_L * problem.time_N[:, None]
            + weights.memory * filled_NL
            + weights.reputation * (1 - traits.reputation_N)[:, None] * share_L
            + weights.price * traits.price_N[:, None],
            weights.latency * problem.hop_NN,
            weights.latency * problem.entry_N,
            weights.latency * problem.exit_N,
        )

    def ways(self, reach_NL: Ints) -> Ways:
        """The costs as whole numbers as fine as fit, for walks."""
        tables = (self.cost_NL, self.hop_NN, self.entry_N, self.exit_N)
        most = max(float(np.abs(costs).max(initial=0.0)) for costs in tables)
        blocks = self.cost_NL.shape[1]
        room = (NEVER // 2 >> blocks.bit_length()) // (2 * blocks + 2)
        scale = 2.0 ** math.floor(math.log2(room) - math.log2(most)) if most > 1e-200 else 1.0
        cost_NL, hop_NN, entry_N, exit_N = (np.asarray(np.rint(costs * scale), np.int64) for costs in tables)
        return Ways(cost_NL, hop_NN, entry_N, exit_N, reach_NL)

    def cost(self, chain: Chain) -> float:
        """What a chain costs, in seconds."""
        ways = [self.hop_NN[one.node, other.node] for one, other in pairwise(chain)]
        ways += [self.entry_N[chain[0].node], self.exit_N[chain[-1].node]]
        return float(sum(self.cost_NL[node, start:end].sum() for node, start, end in chain) + sum(ways))

    @property
    def most(self) -> float:
        """No chain costs more, however many nodes it takes."""
        way = max(float(ways.max()) for ways in (self.hop_NN, self.entry_N, self.exit_N))
        blocks: int = self.cost_NL.shape[1]
        return float(self.cost_NL.max()) * blocks + way * (blocks + 1)

    def clipped(self, most: float) -> Weighed:
        """With every single cost at most `most`: no chain below that changes its cost, and none above falls below."""
        return Weighed(*(np.minimum(costs, most) for costs in (self.cost_NL, self.hop_NN, self.entry_N, self.exit_N)))

    def as_times(self, problem: ChainProblem, most: float) -> tuple[ChainProblem, bool]:
        """A problem whose latency is the cost of every chain below `most`, and whether it is that exactly.

        It is if a block's cost is a product of what the block and what the node bring, as it is for equal blocks. Else
        each node's blocks all cost their mean.
        """
        total, blocks = float(self.cost_NL.sum()), problem.block_count
        work_L = self.cost_NL.sum(axis=0) * (blocks / total) if total > 0 else np.ones(blocks)
        time_N = self.cost_NL.mean(axis=1)
        exact = bool(work_L.min() > 0 and np.allclose(np.outer(time_N, work_L), self.cost_NL, rtol=1e-9, atol=0.0))
        if not exact:
            work_L = np.ones(blocks)
        ways = self.clipped(most)
        # Engines divide by a node's time. What raising one from 0 adds to a chain is far below what is called proven.
        time_N = np.clip(time_N, most * LEAST_SHARE, most / work_L.min())
        times = replace(
            problem,
            work_L=work_L,
            time_N=time_N,
            hop_NN=ways.hop_NN,
            entry_N=ways.entry_N,
            exit_N=ways.exit_N,
            client_s=0.0,
        )
        return times, exact


def weighted_ways(problem: ChainProblem, weights: Weights, traits: Traits, reach_NL: Ints) -> Ways:
    """The terms of H without the lookahead, as whole numbers as fine as fit."""
    return Weighed.of(problem, weights, traits).ways(reach_NL)


class _Picking:
    """One run of the recursion."""

    def __init__(self, ways: Ways, lookahead: float, memory_N: Floats, bytes_L: Floats, max_cases: int) -> None:
        self._ways = ways
        self._lookahead = lookahead
        usable_N = np.minimum(memory_N, bytes_L.sum())
        self._memory_N = np.where(ways.reach_NL.max(axis=1, initial=0) > 0, usable_N, 0.0)
        self._bytes_left_L = np.append(bytes_L[::-1].cumsum()[::-1], 0.0)
        self._cases_left = max_cases

    def chain(self) -> Chain | None:
        ways = self._ways
        allowed_NL = ways.everything()
        before, block = ways.node_count, 0
        chain: list[Stage] = []
        while block < ways.block_count:
            stage = self._pick(allowed_NL, before, block)
            if stage is None:
                return None
            chain.append(stage)
            before, block = stage.node, stage.end
            allowed_NL[before] = False
        return tuple(chain)

    def _pick(self, allowed_NL: Bools, before: int, block: int) -> Stage | None:
        ways = self._ways
        table = ways.table(allowed_NL, start=block + 1)
        stage_EN = ways.stage_costs(before, block, table.reach_NL)
        rest_EN = table.cost_LM[block + 1 :, : ways.node_count].copy()
        memory_N = np.where(allowed_NL.any(axis=1), self._memory_N, 0.0)
        spare_N = memory_N.sum() - memory_N
        rest_EN[self._bytes_left_L[block + 1 :, None] > spare_N * (1 + 1e-12)] = NEVER
        sure: set[tuple[int, int]] = set()
        while True:
            possible = (stage_EN < NEVER // 2) & (rest_EN < NEVER // 2)
            if not possible.any():
                return None
            if self._lookahead == 1:  # whole numbers compare as they are
                pick = int(np.argmin(np.where(possible, stage_EN + rest_EN, NEVER)))
            else:
                pick = int(np.argmin(np.where(possible, stage_EN + self._lookahead * rest_EN, math.inf)))
            row, node = divmod(pick, ways.node_count)
            end = block + 1 + row
            if (row, node) in sure or end == ways.block_count or self._cases_left <= 0:
                return Stage(node, block, end)
            rest_EN[row, node] = self._completion(table, allowed_NL, node, end)
            sure.add((row, node))

    def _completion(self, table: Table, allowed_NL: Bools, node: int, block: int) -> int:
        """The cheapest completion after a node that does not come back to one."""
        walk = table.walk(block, node)
        if len({node, *(stage.node for stage in walk)}) > len(walk):
            return int(table.cost_LM[block, node])
        without_NL = allowed_NL.copy()
        without_NL[node] = False

        def solve(case_NL: Bools, least: Cost | None, most: Cost | None) -> tuple[Cost, Chain] | None:
            self._cases_left -= 1
            return self._ways.table(case_NL, start=block).best(block, node)

        found = cheapest_chain(
            self._ways, allowed_NL=without_NL, solve=solve, before=node, max_cases=max(1, self._cases_left)
        )
        return found[0][0] if found else NEVER
