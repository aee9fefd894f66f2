"""Unequal devices: which of them computes which operators of any model, in which order, and which are left out.

Ours beside max-throughput partitioning, whose machines are equal. A part S on device j after device i costs
f_j(S) = w(S) / speed_j + bytes_in(S) / bandwidth_ij + latency_ij + overflow_j(S); the first pays no transfer. Keys for
the genetic engine are one per operator and one per device: they order both, and a recurrence over prefixes and the last
device used cuts the one and skips in the other as is best.

Suffixes say the axes: V operators, J devices, L and R prefix lengths where a piece begins and ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.planning.brkga import Settings, evolve
from bsns.planning.graph import Floats, Ints, OperatorGraph, kahn_orders
from bsns.planning.graph_planner import BUDGETS, Budget
from bsns.planning.orders import keys_of, natural_orders


@dataclass(frozen=True, eq=False)
class Devices:
    """What computes, and the links between. Raises BadOption for impossible figures."""

    speed_J: Floats
    """1 does an operator's work in `work_V` seconds."""
    bytes_per_s_JJ: Floats
    latency_JJ: Floats
    """Seconds, one way."""
    memory_J: Floats = field(default_factory=lambda: np.zeros(0))
    """Bytes; none given: as much as needed."""
    spill_J: Floats = field(default_factory=lambda: np.zeros(0))
    """Bytes/s at which what does not fit is fetched; none given, or 0: it has to fit."""

    def __post_init__(self) -> None:
        count = len(self.speed_J)
        if not self.memory_J.size:
            object.__setattr__(self, "memory_J", np.full(count, math.inf))
        if not self.spill_J.size:
            object.__setattr__(self, "spill_J", np.zeros(count))
        apart_JJ = ~np.eye(count, dtype=bool)
        shapes = {self.bytes_per_s_JJ.shape, self.latency_JJ.shape} == {(count, count)}
        if not count or not shapes or {self.memory_J.shape, self.spill_J.shape} != {(count,)}:
            raise BadOption(
                f"{count} devices need as many speeds, memories and spill rates, and a link between any two"
            )
        if not ((self.speed_J > 0) & np.isfinite(self.speed_J) & (self.memory_J >= 0) & (self.spill_J >= 0)).all():
            raise BadOption("a device has a speed that is not positive, or a memory or spill rate that is negative")
        if not ((self.bytes_per_s_JJ > 0) & (self.latency_JJ >= 0))[apart_JJ].all():
            raise BadOption("a link has a bandwidth that is not positive, or a negative latency")

    @property
    def count(self) -> int:
        return len(self.speed_J)

    def overflow_s(self, device: int, needed: Floats) -> Floats:
        over: Floats = np.maximum(needed - self.memory_J[device], 0.0)
        return over / self.spill_J[device] if self.spill_J[device] > 0 else np.where(over > 0, math.inf, 0.0)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Each operator's device, and the devices used, in the order in which they compute."""

    device_of: tuple[int, ...]
    order: tuple[int, ...]
    bottleneck_s: float
    lower_bound_s: float
    gap: float
    method: str
    assumptions: tuple[str, ...] = ()


def device_costs(graph: OperatorGraph, device_of: Sequence[int], order: Sequence[int], devices: Devices) -> list[float]:
    """f of each device in the order, in seconds, by definition."""
    costs: list[float] = []
    for number, device in enumerate(order):
        here = [v for v in range(graph.count) if device_of[v] == device]
        cost_s = float(graph.work_V[here].sum()) / float(devices.speed_J[device])
        if number:
            before = order[number - 1]
            read = {u for v in here for u in graph.producers[v] if device_of[u] != device}
            cost_s += float(graph.output_V[list(read)].sum()) / float(devices.bytes_per_s_JJ[before, device])
            cost_s += float(devices.latency_JJ[before, device])
        needed = graph.param_V[here].sum() + graph.peak_V[here].max(initial=0.0)
        costs.append(cost_s + float(devices.overflow_s(device, np.array(needed))))
    return costs


def plan_devices(
    graph: OperatorGraph,
    devices: Devices,
    *,
    rng: np.random.Generator,
    budget: str = "brkga10000",
    remaining_s: Callable[[], float] = lambda: math.inf,
) -> DevicePlan:
    """The best plan found within the budget or the time; never worse than natural orders, fastest devices first.

    Raises BadOption, and NotEnoughMemory where nothing was found that fits.
    """
    if budget not in BUDGETS:
        raise BadOption(f"there is no budget {budget!r}; use {', '.join(BUDGETS)}")
    sizes = BUDGETS[budget]
    cutter = Cutter(graph, devices)
    by_speed_J = np.empty(devices.count)
    by_speed_J[np.argsort(-devices.speed_J, kind="stable")] = np.arange(devices.count) / devices.count
    orders_PV = np.stack(list(natural_orders(graph).values()))
    warm = [
        np.concatenate([keys_V, keys_J]) for keys_J in (by_speed_J, _greedy(devices)) for keys_V in keys_of(orders_PV)
    ]
    costs = [cutter.cost(keys) for keys in warm]
    best, method = warm[int(np.argmin(costs))], "slice"
    notes = []
    if sizes.population:
        first = np.stack([warm[i] for i in np.argsort(costs, kind="stable")])
        evolved = evolve(
            lambda keys_PK: np.array([cutter.cost(keys) for keys in keys_PK]),
            graph.count + devices.count,
            rng=rng,
            settings=Settings(sizes.population, sizes.generations),
            warm=first,
            should_stop=lambda: remaining_s() <= 0,
        )
        if len(evolved.history) < sizes.generations:
            notes.append("the search was stopped before its budget was used up")
        keys, cost_s = _polished(cutter, evolved.keys, evolved.cost, rng, sizes, lambda: remaining_s() <= 0)
        if cost_s < min(costs):
            best, method = keys, budget
    cost_s, device_of, order = cutter.cut(best)
    if math.isinf(cost_s):
        raise NotEnoughMemory(f"no cut of the graph fits {devices.count} devices; give more of them, or more memory")
    unused = devices.count - len(order)
    if unused:
        notes.append(f"{unused} of {devices.count} devices are left out, since they would slow down the rest")
    cost_s = max(device_costs(graph, device_of, order, devices))
    lower_s = min(device_bound_s(graph, devices), cost_s)
    gap = cost_s / lower_s - 1 if lower_s > 0 else 0.0
    return DevicePlan(device_of, order, cost_s, lower_s, gap, method, tuple(notes))


def _polished(
    cutter: Cutter,
    keys_K: Floats,
    cost_s: float,
    rng: np.random.Generator,
    sizes: Budget,
    should_stop: Callable[[], bool],
) -> tuple[Floats, float]:
    """The keys after swapping devices while that helps, and trying other keys for one to three operators or devices."""
    first, last = cutter.graph.count, len(keys_K)
    for one, other in combinations(range(first, last), 2):
        if should_stop():
            return keys_K, cost_s
        swapped_K = keys_K.copy()
        swapped_K[[one, other]] = keys_K[[other, one]]
        if (swapped_s := cutter.cost(swapped_K)) < cost_s:
            keys_K, cost_s = swapped_K, swapped_s
    for _ in range(sizes.population * sizes.generations // 4):
        if should_stop():
            break
        changed_K = keys_K.copy()
        changed = rng.integers(last, size=int(rng.integers(1, 4)))
        changed_K[changed] = rng.random(len(changed))
        # a change that costs nothing may open the way to one that helps
        if (changed_s := cutter.cost(changed_K)) <= cost_s:
            keys_K, cost_s = changed_K, changed_s
    return keys_K, cost_s


def device_bound_s(graph: OperatorGraph, devices: Devices) -> float:
    """No plan has a lower bottleneck: every device but the first waits for its cheapest link before it computes.

    Where one operator feeds all others, at least the smallest tensor comes in as well.
    """
    links_JJ = devices.latency_JJ.astype(np.float64)
    sources = [v for v in range(graph.count) if not graph.producers[v]]
    if len(sources) == 1 and graph.count > 1:
        smallest = min(float(graph.output_V[v]) for v in range(graph.count) if graph.consumers[v])
        links_JJ = links_JJ + smallest / devices.bytes_per_s_JJ
    np.fill_diagonal(links_JJ, math.inf)
    wait_J = links_JJ.min(axis=0)
    work_s, speed_J = float(graph.work_V.sum()), devices.speed_J
    low, high = float(graph.work_V.max() / speed_J.max()), float(work_s / speed_J.max())
    for _ in range(60):
        middle = (low + high) / 2
        waits_J = np.minimum(wait_J, middle)
        done_s = float((speed_J * (middle - waits_J)).sum() + (speed_J * waits_J).max())
        low, high = (middle, high) if done_s < work_s else (low, middle)
    return low


class Cutter:
    """Keys → the best cut of the operators' order over the devices' order."""

    def __init__(self, graph: OperatorGraph, devices: Devices) -> None:
        self.graph, self.devices = graph, devices
        self.limited = bool(np.isfinite(devices.memory_J).any())

    def cost(self, keys_K: Floats) -> float:
        order_V, order_J = self._orders(keys_K)
        return float(min(row_R[-1] for row_R in self._rows(order_V, order_J)[0]))

    def cut(self, keys_K: Floats) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
        """(bottleneck, device of each operator, devices in order)."""
        order_V, order_J = self._orders(keys_K)
        rows, came = self._rows(order_V, order_J)
        last = min(range(len(rows)), key=lambda at: float(rows[at][-1]))
        cost_s, end = float(rows[last][-1]), self.graph.count
        device_V = np.zeros(self.graph.count, dtype=np.intp)
        used: list[int] = []
        while end and math.isfinite(cost_s):
            before, start = came[last][0][end], came[last][1][end]
            device_V[order_V[start:end]] = order_J[last]
            used.append(int(order_J[last]))
            last, end = int(before), int(start)
        return cost_s, tuple(device_V.tolist()), tuple(reversed(used))

    def _orders(self, keys_K: Floats) -> tuple[Ints, Ints]:
        count = self.graph.count
        return kahn_orders(self.graph, keys_K[None, :count])[0], np.argsort(keys_K[count:], kind="stable")

    def _rows(self, order_V: Ints, order_J: Ints) -> tuple[list[Floats], list[tuple[Ints, Ints]]]:
        """For each device as the last one used: bottlenecks by prefix, and which device and prefix came before."""
        graph, devices = self.graph, self.devices
        done_R = np.concatenate([[0.0], np.cumsum(graph.work_V[order_V])])
        work_LR = done_R[None, :] - done_R[:, None]
        size = graph.count + 1
        empty_LR = np.tril(np.ones((size, size), dtype=bool))
        in_LR = incoming_bytes(graph, order_V)
        needed_LR = self._needed(order_V) if self.limited else None
        rows: list[Floats] = []
        came: list[tuple[Ints, Ints]] = []
        for at, device in enumerate(order_J.tolist()):
            own_LR = work_LR / devices.speed_J[device]
            if needed_LR is not None:
                own_LR = own_LR + devices.overflow_s(device, needed_LR)
            own_LR = np.where(empty_LR, math.inf, own_LR)
            best_R, before_R, start_R = own_LR[0].copy(), np.full(size, -1), np.zeros(size, dtype=np.intp)
            for earlier in range(at):
                other = int(order_J[earlier])
                cost_LR = own_LR + (in_LR / devices.bytes_per_s_JJ[other, device] + devices.latency_JJ[other, device])
                np.maximum(cost_LR, rows[earlier][:, None], out=cost_LR)
                from_R = cost_LR.argmin(axis=0)
                found_R = cost_LR[from_R, np.arange(size)]
                better_R = found_R < best_R
                best_R = np.where(better_R, found_R, best_R)
                before_R = np.where(better_R, earlier, before_R)
                start_R = np.where(better_R, from_R, start_R)
            rows.append(best_R)
            came.append((before_R, start_R))
        return rows, came

    def _needed(self, order_V: Ints) -> Floats:
        """Bytes that each piece takes."""
        graph, count = self.graph, self.graph.count
        held_R = np.concatenate([[0.0], np.cumsum(graph.param_V[order_V])])
        needed_LR: Floats = held_R[None, :] - held_R[:, None]
        peak_V = graph.peak_V[order_V]
        if peak_V.any():
            for start in range(count):
                needed_LR[start, start + 1 :] += np.maximum.accumulate(peak_V[start:])
        return needed_LR


def incoming_bytes(graph: OperatorGraph, order_V: Ints) -> Floats:
    """Bytes that come into each piece of an order, from all before it (L, R); a tensor comes once."""
    count = graph.count
    rise_LR = np.zeros((count + 2, count + 1))
    place_V = np.empty(count, dtype=np.intp)
    place_V[order_V] = np.arange(count)
    for v, consumers in enumerate(graph.consumers):
        earlier = int(place_V[v])
        for at in sorted(place_V[list(consumers)].tolist()):
            # pieces that begin behind the maker and the earlier readers, and hold this one
            rise_LR[earlier + 1, at + 1] += graph.output_V[v]
            rise_LR[at + 1, at + 1] -= graph.output_V[v]
            earlier = at
    sums_LR: Floats = rise_LR.cumsum(axis=0).cumsum(axis=1)[: count + 1]
    return np.maximum(sums_LR, 0.0)


def _greedy(devices: Devices) -> Floats:
    """Keys of devices: from the fastest on, always the one with the quickest link."""
    chosen = [int(np.argmax(devices.speed_J))]
    while len(chosen) < devices.count:
        near_J = devices.latency_JJ[chosen[-1]] + 1e6 / devices.bytes_per_s_JJ[chosen[-1]]
        chosen.append(min(set(range(devices.count)) - set(chosen), key=lambda j: float(near_J[j])))
    keys_J = np.empty(devices.count)
    keys_J[chosen] = np.arange(devices.count) / devices.count
    return keys_J
