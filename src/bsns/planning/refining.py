"""Refining: moving operators between the parts of a plan, by simulated annealing, while parts stay in their order.

An operator may go to any part from that of its last producer to that of its first consumer, so the parts can always be
computed one after another. What is minimised is Σ (f / bottleneck)^q, which is smooth where the bottleneck alone is
flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bsns.planning.graph import Fleet, Ints, OperatorGraph, part_costs

STEEPNESS = 24
"""q: how much more the worst part counts than the others."""
HOTTEST, COLDEST = 0.5, 0.03
"""Temperatures, in units of one part at the bottleneck."""
CHUNK = 8192
"""Moves between looks at the clock, with random numbers drawn ahead."""


class _Loads:
    """A partition under way: what each part costs, and what a move would change."""

    def __init__(self, graph: OperatorGraph, fleet: Fleet, part_V: Ints) -> None:
        self.fleet, self.parts = fleet, fleet.machines
        self.part: list[int] = part_V.tolist()
        self.work: list[float] = graph.work_V.tolist()
        self.sent: list[float] = (graph.sent_V / fleet.bytes_per_s).tolist()
        self.producers, self.consumers = graph.producers, graph.consumers
        self.param: list[float] = graph.param_V.tolist()
        self.peak: list[float] = graph.peak_V.tolist()
        self.limited, self.greedy = math.isfinite(fleet.memory_bytes), bool(graph.peak_V.any())
        self.readers: list[dict[int, int]] = []
        """For each operator: how many of its consumers are in which part."""
        for consumers in self.consumers:
            counts: dict[int, int] = {}
            for c in consumers:
                counts[self.part[c]] = counts.get(self.part[c], 0) + 1
            self.readers.append(counts)
        costs_K = np.zeros(self.parts)
        found_K = part_costs(graph, part_V, fleet)
        costs_K[: len(found_K)] = found_K
        self.members: list[set[int]] = [set() for _ in range(self.parts)]
        self.held = [0.0] * self.parts
        for v, part in enumerate(self.part):
            self.members[part].add(v)
            self.held[part] += self.param[v]
        self.cost: list[float] = costs_K.tolist()

    def bounds(self, v: int) -> tuple[int, int]:
        """The first and last part that v may be in."""
        part = self.part
        low = max([part[u] for u in self.producers[v]], default=0)
        return low, min([part[c] for c in self.consumers[v]], default=self.parts - 1)

    def changes(self, v: int, to: int) -> list[tuple[int, float]]:
        """(part, change of its cost) if v moved."""
        part, sent = self.part, self.sent
        away = part[v]
        less, more = -self.work[v], self.work[v]
        readers = self.readers[v]
        if readers:
            size, spread = sent[v], len(readers)
            if away in readers:
                less += size  # now comes in
                if spread > 1:
                    less -= size
            else:
                less -= size
            if to in readers:
                more -= size  # no longer comes in
                if spread > 1:
                    more += size
            else:
                more += size
        others: list[tuple[int, float]] = []
        for u in self.producers[v]:
            size, home, counts = sent[u], part[u], self.readers[u]
            leaves, enters = counts[away] == 1, to not in counts
            if leaves and home != away:
                less -= size
            if enters and home != to:
                more += size
            if leaves or enters:
                inside = home in counts
                sent_before = len(counts) > inside
                inside_after = home == to or (inside and not (leaves and home == away))
                sent_after = len(counts) - leaves + enters > inside_after
                if sent_before != sent_after:
                    change = size if sent_after else -size
                    if home == away:
                        less += change
                    elif home == to:
                        more += change
                    else:
                        others.append((home, change))
        if self.limited:
            less += self._overflow(away, -self.param[v], v, 0.0) - self._overflow(away, 0.0, -1, 0.0)
            more += self._overflow(to, self.param[v], -1, self.peak[v]) - self._overflow(to, 0.0, -1, 0.0)
        if others:
            merged = {away: less, to: more}
            for home, change in others:
                merged[home] = merged.get(home, 0.0) + change
            return list(merged.items())
        return [(away, less), (to, more)]

    def move(self, v: int, to: int, changes: list[tuple[int, float]]) -> None:
        away = self.part[v]
        for u in self.producers[v]:
            counts = self.readers[u]
            counts[to] = counts.get(to, 0) + 1
            if counts[away] == 1:
                del counts[away]
            else:
                counts[away] -= 1
        self.part[v] = to
        self.members[away].discard(v)
        self.members[to].add(v)
        self.held[away] -= self.param[v]
        self.held[to] += self.param[v]
        for part, change in changes:
            self.cost[part] += change

    def _overflow(self, part: int, more: float, without: int, peak: float) -> float:
        if self.greedy:
            peak = max(peak, max([self.peak[u] for u in self.members[part] if u != without], default=0.0))
        over = self.held[part] + more + peak - self.fleet.memory_bytes
        if over > 0 and self.fleet.hard_memory:
            return math.inf
        return max(over, 0.0) / self.fleet.bytes_per_s


def refine(
    graph: OperatorGraph,
    fleet: Fleet,
    part_of: Sequence[int] | Ints,
    *,
    rng: np.random.Generator,
    moves: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[float, Ints]:
    """The least bottleneck met within `moves` tried moves, and its partition; never worse than what it starts from.

    `part_of` numbers the parts in an order in which they can be computed (see `order_of_parts`), and fits.
    """
    part_V = np.asarray(part_of, dtype=np.intp)
    best_s = float(part_costs(graph, part_V, fleet).max())
    best_V = part_V.copy()
    edges = graph.edges_E2.tolist()
    if fleet.machines == 1 or graph.count == 1 or not math.isfinite(best_s) or best_s <= 0:
        return best_s, best_V
    loads = _Loads(graph, fleet, part_V)
    scale = best_s
    tried = 0
    while tried < moves and not should_stop():
        temperature = HOTTEST * (COLDEST / HOTTEST) ** (tried / moves)
        best_s, best_part = _anneal(loads, edges, rng, min(CHUNK, moves - tried), temperature, scale, best_s)
        if best_part is not None:
            best_V = np.array(best_part, dtype=np.intp)
        tried += CHUNK
    exact_s = float(part_costs(graph, best_V, fleet).max())
    start_s = float(part_costs(graph, part_V, fleet).max())
    return (exact_s, best_V) if exact_s < start_s else (start_s, part_V.copy())


def _anneal(
    loads: _Loads,
    edges: list[list[int]],
    rng: np.random.Generator,
    moves: int,
    temperature: float,
    scale: float,
    best_s: float,
) -> tuple[float, list[int] | None]:
    """Tries so many moves at one temperature. The best bottleneck, and its partition if it is new."""
    part, cost, count = loads.part, loads.cost, len(loads.part)
    best: list[int] | None = None
    pick_N = rng.integers(len(edges), size=moves).tolist() if edges else [0] * moves
    any_N = rng.integers(count, size=moves).tolist()
    kind_N, luck_N, where_N = rng.random(moves).tolist(), rng.random(moves).tolist(), rng.random(moves).tolist()
    for pick, any_v, kind, luck, where in zip(pick_N, any_N, kind_N, luck_N, where_N, strict=True):
        if kind < 0.85 and edges:
            # along a tensor that is cut: to where it is made, or where it is read
            one, other = edges[pick]
            if part[one] == part[other]:
                continue
            v, to = (one, part[other]) if kind < 0.425 else (other, part[one])
            low, high = loads.bounds(v)
            if not low <= to <= high:
                continue
        else:
            v = any_v
            low, high = loads.bounds(v)
            if low == high:
                continue
            to = low + int(where * (high - low))
            to += to >= part[v]
        changes = loads.changes(v, to)
        change = 0.0
        for home, difference in changes:
            now = cost[home]
            after = (now + difference) / scale
            if after > 10:  # and never raise what has no power that a float can hold
                change = math.inf
                break
            change += after**STEEPNESS - (now / scale) ** STEEPNESS
        if change <= 0 or luck < math.exp(-change / temperature):
            loads.move(v, to, changes)
            if max(cost) < best_s * (1 - 1e-12):
                best_s, best = max(cost), part.copy()
    return best_s, best
