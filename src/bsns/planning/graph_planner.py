"""Graph plans: which machine computes which operators of an arbitrary model, and how near that is to the best possible.

Max-throughput partitioning (Archer et al., ICML 2024, arXiv 2311.03703). Natural orders are cut first (Kahn + slice),
so that no plan is worse than the best of them; the genetic engine then looks for better orders, at first anywhere,
later near the best one; and in between single operators are moved between the parts.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.planning.brkga import Settings, evolve
from bsns.planning.graph import Fleet, Floats, Ints, OperatorGraph, is_order, kahn_orders, order_of_parts, part_costs
from bsns.planning.graph_bounds import Bounds
from bsns.planning.orders import keys_of, lined_up, natural_orders
from bsns.planning.refining import refine
from bsns.planning.slicing import best_slice, slice_orders


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a search may be. `moves` are tried per operator in each of several refinements."""

    population: int
    generations: int
    rounds: int
    """That share the generations."""
    starts: int
    """Natural orders that are refined."""
    moves: int


BUDGETS = {
    "slice": Budget(0, 0, 0, 0, 0),
    "brkga100": Budget(10, 10, 2, 1, 50),
    "brkga10000": Budget(100, 100, 4, 4, 400),
}
"""Archer's 10×10 and 100×100 (population × generations); and Kahn + slice alone."""
REACH = (1.0, 0.3, 0.1, 0.03)
"""How far, of the whole order, an operator's key may move it from its place in the best order, round by round."""
LEAST = 250
"""Operators for which moves are counted at least: small graphs need as long to cool down."""
PATIENCE = 8
"""Generations without a better best before a round gives way to the next."""


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """A partition with its proof: `lower_bound_s` bounds every partition's bottleneck, `gap` = ours / that − 1."""

    part_of: tuple[int, ...]
    """Each operator's part; parts are numbered in an order in which they can be computed."""
    parts: int
    bottleneck_s: float
    lower_bound_s: float
    gap: float
    method: str
    """The budget whose search found it; `slice` and an order's name, where none did; `exact` where a proof did."""
    assumptions: tuple[str, ...] = ()


def plan_graph(
    graph: OperatorGraph,
    fleet: Fleet,
    *,
    rng: np.random.Generator,
    budget: str = "brkga10000",
    warm: Sequence[Sequence[int]] = (),
    bounds: Bounds | None = None,
    prove: bool = True,
    remaining_s: Callable[[], float] = lambda: math.inf,
) -> GraphPlan:
    """The best partition found within the budget, or until `remaining_s` is used up; never worse than Kahn + slice.

    A proof may meet a better one, which is then taken, up to the optimum on narrow graphs; without `prove` only quick
    bounds are looked for. `warm` are topological orders to start from as well. Raises BadOption, and NotEnoughMemory
    where memory is hard and no cut was found that fits.
    """
    if budget not in BUDGETS:
        raise BadOption(f"there is no budget {budget!r}; use {', '.join(BUDGETS)}")
    if not all(is_order(graph, order) for order in warm):
        raise BadOption("a warm start is no topological order of the graph")
    notes = []
    if fleet.machines > graph.count:
        notes.append(f"the graph has {graph.count} operators; {fleet.machines - graph.count} machines are left out")
        fleet = replace(fleet, machines=graph.count)
    bounds = bounds or Bounds(graph)
    search = _Search(graph, fleet, rng, bounds.quick(fleet).value_s, lambda: remaining_s() <= 0)
    orders = {f"warm {i}": np.array(order, dtype=np.intp) for i, order in enumerate(warm)} | natural_orders(graph)
    method = search.start(orders)
    if math.isinf(search.best_s):
        raise NotEnoughMemory(
            f"no cut of the graph into {fleet.machines} parts fits {fleet.memory_bytes:.0f} bytes each; "
            "give more machines, or more memory"
        )
    if search.run(BUDGETS[budget]):
        method = budget
    if search.stopped:
        notes.append("the search was stopped before its budget was used up")
    part_of, bottleneck_s = search.part_V, float(part_costs(graph, search.part_V, fleet).max())
    lower_s = search.good_s
    if prove:
        bound = bounds.lower(fleet, bottleneck_s, should_stop=lambda: remaining_s() <= 0)
        lower_s = bound.value_s
        if bound.part_of is not None:
            part_of, method = np.array(bound.part_of, dtype=np.intp), "exact"
            bottleneck_s = float(part_costs(graph, part_of, fleet).max())
    part_V = order_of_parts(graph, part_of)
    return GraphPlan(
        part_of=tuple(part_V.tolist()),
        parts=int(part_V.max()) + 1,
        bottleneck_s=bottleneck_s,
        lower_bound_s=min(lower_s, bottleneck_s),
        gap=max(bottleneck_s / lower_s - 1, 0.0) if lower_s > 0 else 0.0,
        method=method,
        assumptions=tuple(notes),
    )


class _Search:
    """The best partition so far, and what may still improve it."""

    def __init__(
        self,
        graph: OperatorGraph,
        fleet: Fleet,
        rng: np.random.Generator,
        good_s: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self.graph, self.fleet, self.rng, self.good_s = graph, fleet, rng, good_s
        self.best_s = math.inf
        self.part_V = np.zeros(graph.count, dtype=np.intp)
        self.stopped = False
        self._should_stop = should_stop

    def start(self, orders: dict[str, Ints]) -> str:
        """Cuts each order; the name of the best."""
        starts_PV = np.stack(list(orders.values()))
        cost_P = slice_orders(self.graph, starts_PV, self.fleet)
        self.orders_PV = starts_PV[np.argsort(cost_P, kind="stable")]
        self.best_s, self.part_V = best_slice(self.graph, self.orders_PV[0], self.fleet)
        return f"slice, {list(orders)[int(np.argmin(cost_P))]}"

    def run(self, budget: Budget) -> bool:
        """Searches until the budget is used up, time is, or nothing can be better; whether that improved anything."""
        start_s = self.best_s
        for order_V in self.orders_PV[: budget.starts].copy():
            self._refine(best_slice(self.graph, order_V, self.fleet)[1], order_V, budget.moves)
        for number in range(budget.rounds):
            reach = REACH[round(number * (len(REACH) - 1) / max(budget.rounds - 1, 1))]
            self._evolve(budget, reach)
            self._refine(self.part_V, self.orders_PV[0], budget.moves)
        return self.best_s < start_s * (1 - 1e-12)

    def _evolve(self, budget: Budget, reach: float) -> None:
        if self._finished():
            return
        elite = round(budget.population * Settings().elite)
        decode = _Decoder(self.graph, self.fleet, keys_of(self.orders_PV[:1])[0], reach, elite)
        evolved = evolve(
            decode,
            self.graph.count,
            rng=self.rng,
            settings=Settings(budget.population, max(budget.generations // budget.rounds, 1)),
            warm=decode.keys(self.orders_PV),
            should_stop=lambda: decode.idle >= PATIENCE or self._finished(),
        )
        order_V = decode.orders(evolved.keys[None])[0]
        self._offer(*best_slice(self.graph, order_V, self.fleet), order_V)

    def _refine(self, part_V: Ints, order_V: Ints, moves: int) -> None:
        """From this partition, whose parts are numbered in order; then cuts the order that came of it."""
        if self._finished() or not moves:
            return
        cost_s, part_V = refine(
            self.graph,
            self.fleet,
            part_V,
            rng=self.rng,
            moves=moves * max(self.graph.count, LEAST),
            should_stop=self._finished,
        )
        order_V = lined_up(self.graph, part_V, order_V)
        self._offer(cost_s, part_V, order_V)
        self._offer(*best_slice(self.graph, order_V, self.fleet), order_V)

    def _offer(self, cost_s: float, part_V: Ints, order_V: Ints) -> None:
        """Keeps the order to start from, first if it is as good as the best, and the partition if it is better."""
        first = cost_s <= self.best_s * (1 + 1e-9)
        self.orders_PV = np.insert(self.orders_PV, 0 if first else 1, order_V, axis=0)
        if cost_s < self.best_s:
            self.best_s, self.part_V = cost_s, part_V

    def _finished(self) -> bool:
        self.stopped = self.stopped or self._should_stop()
        return self.stopped or self.best_s <= self.good_s * (1 + 1e-9)


class _Decoder:
    """Keys → orders → bottlenecks, for the genetic engine.

    Only what would enter the elite has its exact cost; the rest counts as inf, which is much faster to tell. To the
    engine that is the same, since it draws mothers from all who are not of the elite alike.
    """

    def __init__(self, graph: OperatorGraph, fleet: Fleet, centre_V: Floats, reach: float, elite: int) -> None:
        self.graph, self.fleet, self.centre_V, self.reach = graph, fleet, centre_V, reach
        self.elite, self.best = max(elite, 1), list[float]()
        self.least_s = math.inf
        self.idle = 0
        """Generations since the best one came."""

    def __call__(self, keys_PV: Floats) -> Floats:
        limit_s = -self.best[0] if len(self.best) == self.elite else math.inf
        cost_P = slice_orders(self.graph, self.orders(keys_PV), self.fleet, limit_s)
        for cost_s in cost_P[np.isfinite(cost_P)].tolist():
            heapq.heappush(self.best, -cost_s)
            if len(self.best) > self.elite:
                heapq.heappop(self.best)
        self.idle = 0 if cost_P.min() < self.least_s else self.idle + 1
        self.least_s = min(self.least_s, float(cost_P.min()))
        return cost_P

    def orders(self, keys_PV: Floats) -> Ints:
        if self.reach < 1:
            keys_PV = self.centre_V + self.reach * (keys_PV - 0.5)
        return kahn_orders(self.graph, keys_PV)

    def keys(self, orders_PV: Ints) -> Floats:
        """Keys that give these orders, or orders between them and the centre where they are beyond reach."""
        keys_PV = keys_of(orders_PV)
        return np.clip((keys_PV - self.centre_V) / self.reach + 0.5, 0, 0.999999) if self.reach < 1 else keys_PV
