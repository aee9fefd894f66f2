"""Operator graphs: what an arbitrary model computes, what its parts cost, and in which orders it can be computed.

The cost of a part S is that of max-throughput partitioning (Archer et al., ICML 2024, arXiv 2311.03703):
f(S) = io(V∖S, S) + w(S) + overflow(S) + io(S, V∖S), where io counts a producer once per consuming part on the way in
and once on the way out. Suffixes say the axes: V operators, E edges, K parts, P orders.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import BadGraph, BadOption

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

GRAPH_VERSION = 1
MAX_OPERATORS = 100_000
MAX_TIME_S = 1e6
MAX_SIZE = 2.0**60


@dataclass(frozen=True, eq=False)
class OperatorGraph:
    """A model as operators and the tensors between them. Raises BadGraph for cycles and impossible figures."""

    names: tuple[str, ...]
    work_V: Floats
    """Seconds on a machine of speed 1."""
    output_V: Floats
    """Bytes of what an operator hands to its consumers, each of which gets all of it."""
    edges_E2: Ints
    """Rows (producer, consumer); an edge given twice counts once."""
    param_V: Floats = field(default_factory=lambda: np.zeros(0))
    """Bytes of parameters; none given: 0."""
    peak_V: Floats = field(default_factory=lambda: np.zeros(0))
    """Bytes an operator takes while it runs; a part takes those of its greediest. None given: 0."""

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 0 < count <= MAX_OPERATORS:
            raise BadGraph(f"the graph has {count} operators; it needs 1 to {MAX_OPERATORS}")
        if len(set(self.names)) < count:
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise BadGraph(f"two operators are called {twice[:64]!r}")
        limits = {"work_V": MAX_TIME_S, "output_V": MAX_SIZE, "param_V": MAX_SIZE, "peak_V": MAX_SIZE}
        for name, most in limits.items():
            given = np.asarray(getattr(self, name), dtype=np.float64)
            values_V = np.zeros(count) if name in ("param_V", "peak_V") and not given.size else given.copy()
            if values_V.shape != (count,):
                raise BadGraph(f"{name} has the shape {values_V.shape} and the graph {count} operators")
            wrong_V = ~((values_V >= 0) & (values_V <= most))  # NaN compares false
            if wrong_V.any():
                at = int(np.argmax(wrong_V))
                raise BadGraph(f"operator {self.names[at][:64]!r}: {name} is {values_V[at]}")
            values_V.setflags(write=False)
            object.__setattr__(self, name, values_V)
        edges_E2 = np.asarray(self.edges_E2, dtype=np.intp).reshape(-1, 2)
        outside_E = ((edges_E2 < 0) | (edges_E2 >= count)).any(axis=1)
        if outside_E.any():
            raise BadGraph(f"the edge {tuple(edges_E2[np.argmax(outside_E)].tolist())} leads to an unknown operator")
        edges_E2 = np.unique(edges_E2, axis=0)
        edges_E2.setflags(write=False)
        object.__setattr__(self, "edges_E2", edges_E2)
        if len(kahn(self, range(count))) < count:
            raise BadGraph(f"the graph has a cycle: {' → '.join(name[:64] for name in self._cycle())}")

    @property
    def count(self) -> int:
        return len(self.names)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        return _grouped(self.edges_E2, 0, self.count)

    @cached_property
    def producers(self) -> tuple[tuple[int, ...], ...]:
        return _grouped(self.edges_E2, 1, self.count)

    @cached_property
    def sent_V(self) -> Floats:
        """Bytes of an operator's output, 0 where nobody consumes it."""
        return np.where(np.bincount(self.edges_E2[:, 0], minlength=self.count) > 0, self.output_V, 0.0)

    @cached_property
    def depth_V(self) -> Ints:
        """Edges on the longest way from any source."""
        depth = [0] * self.count
        for v in kahn(self, range(self.count)):
            for c in self.consumers[v]:
                depth[c] = max(depth[c], depth[v] + 1)
        return np.array(depth, dtype=np.intp)

    def to_json(self) -> bytes:
        """The graph as `from_json` reads it."""
        operators = [
            {"name": name, "work_s": work, "output_bytes": output, "param_bytes": param, "peak_bytes": peak}
            for name, work, output, param, peak in zip(
                self.names,
                self.work_V.tolist(),
                self.output_V.tolist(),
                self.param_V.tolist(),
                self.peak_V.tolist(),
                strict=True,
            )
        ]
        edges = [[self.names[u], self.names[v]] for u, v in self.edges_E2.tolist()]
        value: dict[str, Any] = {"version": GRAPH_VERSION, "operators": operators, "edges": edges}
        return msgspec.json.format(msgspec.json.encode(value), indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> OperatorGraph:
        """The graph in a file, edges as pairs of names. Raises BadGraph with the reason."""
        try:
            file = msgspec.json.decode(text, type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadGraph(f"this is not an operator graph: {error}") from None
        if file.version != GRAPH_VERSION:
            raise BadGraph(f"this graph has version {file.version}, this program knows {GRAPH_VERSION}")
        index = {entry.name: number for number, entry in enumerate(file.operators)}
        for name in (name for edge in file.edges for name in edge):
            if name not in index:
                raise BadGraph(f"an edge names {name[:64]!r}, which is no operator of the graph")
        return cls(
            tuple(entry.name for entry in file.operators),
            np.array([entry.work_s for entry in file.operators]),
            np.array([entry.output_bytes for entry in file.operators]),
            np.array([(index[one], index[other]) for one, other in file.edges], dtype=np.intp).reshape(-1, 2),
            np.array([entry.param_bytes for entry in file.operators]),
            np.array([entry.peak_bytes for entry in file.operators]),
        )

    def _cycle(self) -> list[str]:
        """Names along one cycle, the first again at its end. Only of a graph that has one."""
        ordered = set(kahn(self, range(self.count)))
        seen: dict[int, int] = {}
        v = next(v for v in range(self.count) if v not in ordered)
        while v not in seen:  # whatever Kahn could not place waits for a producer that it could not place either
            seen[v] = len(seen)
            v = next(u for u in self.producers[v] if u not in ordered)
        around = [u for u in seen if seen[u] >= seen[v]]
        return [self.names[u] for u in (v, *reversed(around))]


@dataclass(frozen=True, slots=True)
class Fleet:
    """Equal machines, as many as there may be parts. `bytes_per_s` is the bandwidth B of all io and of overflow."""

    machines: int
    bytes_per_s: float
    memory_bytes: float = math.inf
    hard_memory: bool = False
    """A part that does not fit is impossible, in place of paying for what overflows."""

    def __post_init__(self) -> None:
        if self.machines < 1 or not self.bytes_per_s > 0 or not self.memory_bytes >= 0:
            raise BadOption(
                f"{self.machines} machines with {self.bytes_per_s} bytes/s and {self.memory_bytes} bytes of memory "
                "cannot share a model"
            )

    def overflow_s(self, needed_bytes: Floats) -> Floats:
        """Seconds that parts of this size pay for not fitting."""
        over = np.maximum(needed_bytes - self.memory_bytes, 0.0)
        return np.where(over > 0, math.inf, 0.0) if self.hard_memory else over / self.bytes_per_s


def kahn(graph: OperatorGraph, ranks: Sequence[int]) -> list[int]:
    """The topological order that always takes the ready operator of the least rank; ranks must differ.

    Shorter than the graph exactly where that has a cycle.
    """
    consumers = graph.consumers
    waits = [len(producers) for producers in graph.producers]
    by_rank = [0] * len(waits)
    for v, rank in enumerate(ranks):
        by_rank[rank] = v
    ready = [ranks[v] for v, count in enumerate(waits) if not count]
    heapq.heapify(ready)
    pop, push, order = heapq.heappop, heapq.heappush, []
    while ready:
        v = by_rank[pop(ready)]
        order.append(v)
        for c in consumers[v]:
            waits[c] -= 1
            if not waits[c]:
                push(ready, ranks[c])
    return order


def kahn_orders(graph: OperatorGraph, keys_PV: Floats) -> Ints:
    """Topological orders (P, V) by keys: always the ready operator of the least key, ties by index."""
    ranks_PV = np.argsort(np.argsort(keys_PV, axis=1, kind="stable"), axis=1, kind="stable")
    return np.array([kahn(graph, ranks) for ranks in ranks_PV.tolist()], dtype=np.intp)


def is_order(graph: OperatorGraph, order_V: Sequence[int] | Ints) -> bool:
    """Whether every operator stands there once, after all its producers."""
    if sorted(order_V) != list(range(graph.count)):
        return False
    place_V = np.empty(graph.count, dtype=np.intp)
    place_V[np.asarray(order_V)] = np.arange(graph.count)
    return bool((place_V[graph.edges_E2[:, 0]] < place_V[graph.edges_E2[:, 1]]).all())


def quotient_is_acyclic(graph: OperatorGraph, part_of: Sequence[int] | Ints) -> bool:
    """Whether the parts can be computed one after another. Depth-first and on its own, so that it checks the rest."""
    after: dict[int, set[int]] = {int(part): set() for part in part_of}
    for u, v in graph.edges_E2.tolist():
        if part_of[u] != part_of[v]:
            after[int(part_of[u])].add(int(part_of[v]))
    done: set[int] = set()
    for root in after:
        stack, open_ = [(root, iter(after[root]))], {root}
        if root in done:
            continue
        while stack:
            part, rest = stack[-1]
            following = next((other for other in rest if other not in done), None)
            if following is None:
                stack.pop()
                open_.discard(part)
                done.add(part)
            elif following in open_:
                return False
            else:
                open_.add(following)
                stack.append((following, iter(after[following])))
    return True


def part_costs(graph: OperatorGraph, part_of: Sequence[int] | Ints, fleet: Fleet) -> Floats:
    """f of each part, in seconds, by definition and for any partition: numbers from 0, empty parts cost 0."""
    part_V = np.asarray(part_of, dtype=np.intp)
    count = int(part_V.max()) + 1
    load_K: Floats = np.bincount(part_V, weights=graph.work_V, minlength=count).astype(np.float64)
    from_E, to_E = part_V[graph.edges_E2[:, 0]], part_V[graph.edges_E2[:, 1]]
    cut_C2 = np.unique(np.stack([graph.edges_E2[:, 0], to_E], axis=1)[from_E != to_E], axis=0)
    load_K += np.bincount(cut_C2[:, 1], weights=graph.output_V[cut_C2[:, 0]], minlength=count) / fleet.bytes_per_s
    sent = np.unique(cut_C2[:, 0])
    load_K += np.bincount(part_V[sent], weights=graph.output_V[sent], minlength=count) / fleet.bytes_per_s
    needed_K = np.bincount(part_V, weights=graph.param_V, minlength=count)
    peak_K = np.zeros(count)
    np.maximum.at(peak_K, part_V, graph.peak_V)
    return load_K + fleet.overflow_s(needed_K + peak_K)


def order_of_parts(graph: OperatorGraph, part_of: Sequence[int] | Ints) -> Ints:
    """The partition with its parts renumbered from 0, without gaps, in an order in which they can be computed."""
    names, part_V = np.unique(np.asarray(part_of), return_inverse=True)
    edges = np.unique(part_V[graph.edges_E2], axis=0)
    edges = edges[edges[:, 0] != edges[:, 1]]
    count = len(names)
    quotient = OperatorGraph(tuple(map(str, range(count))), np.zeros(count), np.zeros(count), edges)
    rank_K = np.empty(count, dtype=np.intp)
    rank_K[kahn(quotient, range(count))] = np.arange(count)
    ordered: Ints = rank_K[part_V]
    return ordered


class _Operator(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    work_s: float
    output_bytes: float = 0.0
    param_bytes: float = 0.0
    peak_bytes: float = 0.0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    operators: list[_Operator]
    edges: list[tuple[str, str]]
    version: int = GRAPH_VERSION


def _grouped(edges_E2: Ints, by: int, count: int) -> tuple[tuple[int, ...], ...]:
    """For each operator, the other ends of its edges."""
    order_E = np.argsort(edges_E2[:, by], kind="stable")
    others = edges_E2[order_E, 1 - by].tolist()
    ends = np.searchsorted(edges_E2[order_E, by], np.arange(count + 1)).tolist()
    return tuple(tuple(others[start:end]) for start, end in pairwise(ends))
