"""`bsns bench plan --part dag`: how near plans of arbitrary graphs come to what is provably the best.

A fixed suite. Layered and branching graphs have random work and tensors (log-normal, about their means 1 ms and 1 MB;
10 GB/s); MoE-like and U-Net-like ones have those of layer shapes at a sustained 10 TFLOP/s (fp16), over 100 Gbit/s.
Figures are chosen for what such machines do, not for what the planner does; the share of communication in
the bottleneck that follows from them is reported beside the gaps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bsns.planning.graph import Fleet, OperatorGraph, part_costs, quotient_is_acyclic
from bsns.planning.graph_bounds import Bounds
from bsns.planning.graph_planner import GraphPlan, plan_graph

PARTS = (2, 4, 8, 16, 32, 64)
FLOPS = 1e13
QUICK_PARTS = (4, 16)
METHODS = ("slice", "brkga100", "brkga10000")


@dataclass(frozen=True, slots=True)
class Case:
    """A graph of the suite, and what its machines' network carries."""

    kind: str
    size: int
    """Operators asked for; the graph has about as many."""
    graph: OperatorGraph
    bytes_per_s: float

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple(k for k in PARTS if k <= self.graph.count // 2)


@dataclass
class _Draft:
    """A graph while it is written down."""

    work: list[float] = field(default_factory=list)
    output: list[float] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, work_s: float, output_bytes: float, *reads: int) -> int:
        self.work.append(work_s)
        self.output.append(output_bytes)
        self.edges += [(u, len(self.work) - 1) for u in reads]
        return len(self.work) - 1

    def graph(self) -> OperatorGraph:
        names = tuple(f"op{v}" for v in range(len(self.work)))
        edges = np.array(self.edges, dtype=np.intp).reshape(-1, 2)
        return OperatorGraph(names, np.array(self.work), np.array(self.output), edges)


def layered(count: int, rng: np.random.Generator) -> Case:
    """Layers of about count^0.4 operators; each reads one to three of the layer before, some a layer long ago."""
    draft, width = _Draft(), max(3, round(count**0.4))
    before: list[int] = []
    older: list[int] = []
    while len(draft.work) < count:
        here = []
        for _ in range(min(width, count - len(draft.work))):
            reads = (
                set(rng.choice(before, size=min(len(before), int(rng.integers(1, 4)))).tolist()) if before else set()
            )
            if older and rng.random() < 0.05:
                reads.add(int(rng.choice(older)))
            here.append(draft.add(_log_normal(rng, 1e-3, 0.8), _log_normal(rng, 1e6, 0.5), *reads))
        older, before = before, here
    return Case("layered", count, draft.graph(), 10e9)


def branching(count: int, rng: np.random.Generator) -> Case:
    """Inception-like modules in a row: a split, three to six branches of one to four operators, a concatenation."""
    draft = _Draft()
    last = draft.add(1e-3, 1e6)
    while len(draft.work) < count:
        ends = []
        for _ in range(int(rng.integers(3, 7))):
            at = last
            for _ in range(int(rng.integers(1, 5))):
                at = draft.add(_log_normal(rng, 1e-3, 0.8), _log_normal(rng, 1e6, 0.5), at)
            ends.append(at)
        last = draft.add(1e-4, sum(draft.output[v] for v in ends) / 2, *ends)
    return Case("branching", count, draft.graph(), 10e9)


def moe(count: int, rng: np.random.Generator) -> Case:
    """Decoder blocks with eight experts, two per token, of Mixtral's shapes; 512 tokens; experts unevenly liked."""
    draft, tokens, hidden, inner, experts = _Draft(), 512, 4096, 14336, 8
    row = tokens * hidden * 2.0

    def matmul(rows: float, one: int, other: int) -> float:
        return 2 * rows * one * other / FLOPS * _log_normal(rng, 1.0, 0.1)

    stream = draft.add(1e-4, row)
    while len(draft.work) < count:
        norm = draft.add(1e-4, row, stream)
        q = draft.add(matmul(tokens, hidden, hidden), row, norm)
        k, v = (draft.add(matmul(tokens, hidden, hidden // 4), row / 4, norm) for _ in range(2))
        attention = draft.add(matmul(tokens, hidden, 2 * tokens), row, q, k, v)
        projected = draft.add(matmul(tokens, hidden, hidden), row, attention)
        stream = draft.add(1e-4, row, projected, stream)
        norm = draft.add(1e-4, row, stream)
        router = draft.add(matmul(tokens, hidden, experts), tokens * 2 * 4.0, norm)
        outs = []
        for share in rng.dirichlet(np.full(experts, 8.0)):
            rows = 2 * tokens * share
            taken = draft.add(1e-5, rows * hidden * 2, norm, router)
            up = draft.add(2 * matmul(rows, hidden, inner), rows * inner * 2, taken)
            outs.append(draft.add(matmul(rows, inner, hidden), rows * hidden * 2, up))
        mixed = draft.add(1e-4, row, router, *outs)
        stream = draft.add(1e-4, row, mixed, stream)
    return Case("moe", count, draft.graph(), 12.5e9)


def unet(count: int, rng: np.random.Generator) -> Case:
    """Down four levels and up again, residual convolution blocks of a latent-diffusion U-Net's shapes, skips across."""
    draft, levels = _Draft(), ((320, 64), (640, 32), (1280, 16), (1280, 8))
    blocks = max(1, round((count - 8) / (5 * 2 * len(levels))))

    def conv(read: int, width: int, size: int, *others: int) -> int:
        work_s = 2 * 9 * width * width * size * size / FLOPS * _log_normal(rng, 1.0, 0.1)
        return draft.add(work_s, 2.0 * width * size * size, read, *others)

    def block(at: int, width: int, size: int, *others: int) -> int:
        bytes_ = 2.0 * width * size * size
        norm = draft.add(2e-5, bytes_, at, *others)
        one = conv(norm, width, size)
        act = draft.add(2e-5, bytes_, one)
        return draft.add(2e-5, bytes_, conv(act, width, size), at)

    at = draft.add(1e-4, 2.0 * 320 * 64 * 64)
    skips = []
    for width, size in levels:
        at = draft.add(1e-4, 2.0 * width * size * size, at)
        for _ in range(blocks):
            at = block(at, width, size)
        skips.append(at)
    for (width, size), skip in zip(levels[::-1], skips[::-1], strict=True):
        at = draft.add(1e-4, 2.0 * width * size * size, at)
        for number in range(blocks):
            at = block(at, width, size, *([skip] if number == 0 else []))
    return Case("unet", count, draft.graph(), 12.5e9)


KINDS: dict[str, Callable[[int, np.random.Generator], Case]] = {
    "layered": layered,
    "branching": branching,
    "moe": moe,
    "unet": unet,
}
SIZES = {
    "layered": (50, 200, 500, 2000),
    "branching": (50, 200, 500, 1000),
    "moe": (50, 200, 500, 1000),
    "unet": (50, 200, 500, 2000),
}


def suite(quick: bool) -> Iterator[Case]:
    """The graphs, always the same; the quick ones are the smallest."""
    for number, (kind, sizes) in enumerate(SIZES.items()):
        for size in sizes[: 1 if quick else None]:
            yield KINDS[kind](size, np.random.default_rng([2024, number, size]))


def run_graph_suite(quick: bool, told: Callable[[str], None]) -> dict[str, Any]:
    """Plan every graph of the suite for every number of parts, with every budget. Keys as in docs/benchmarks.md.

    `known` says which side of a gap is loose: our plans beside the best partition known (proofs sometimes meet a better
    one), and that beside the bound.
    """
    rows: list[dict[str, Any]] = []
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for case in suite(quick):
        bounds = Bounds(case.graph)
        for k in [k for k in case.parts if not quick or k in QUICK_PARTS]:
            row = _row(case, k, bounds)
            told(
                f"{row['kind']} {row['operators']}, k = {k}: "
                + ", ".join(f"{m} {row[m]:.4f}" for m in METHODS)
                + f" × the bound ({row['bound']}); {row['io_share']:.1%} io; {row['ms']['brkga10000'] / 1e3:.1f} s"
            )
            rows.append(row)
    at_16 = [row for row in rows if row["k"] == 16]
    return {
        "dag": {
            "gap": {method: _ratio(rows, method) for method in METHODS},
            "gap_k16": _ratio(at_16, "brkga10000"),
            "by_kind": {kind: _all_means([row for row in rows if row["kind"] == kind]) for kind in KINDS},
            "by_k": {str(k): _all_means(some) for k in PARTS if (some := [row for row in rows if row["k"] == k])},
            "by_size": {
                str(size): _all_means([row for row in rows if row["size"] == size])
                for size in sorted({row["size"] for row in rows})
            },
            "k16_by_size": {
                str(size): _all_means([row for row in at_16 if row["size"] == size])
                for size in sorted({row["size"] for row in at_16})
            },
            "known": {
                "plan": _ratio(rows, "brkga10000", "known"),
                "plan_k16": _ratio(at_16, "brkga10000", "known"),
                "bound": _ratio(rows, "known"),
                "bound_k16": _ratio(at_16, "known"),
            },
            "ms": {what: round(sum(row["ms"][what] for row in rows) / len(rows), 1) for what in (*METHODS, "bound")},
            "acyclic": all(row["acyclic"] for row in rows),
            "graphs": len({(row["kind"], row["operators"]) for row in rows}),
            "cases": len(rows),
            "seconds": round(time.perf_counter() - began_s, 1),
            "cpu_seconds": round(time.process_time() - began_cpu_s, 1),
            "rows": rows,
        }
    }


def _row(case: Case, k: int, bounds: Bounds) -> dict[str, Any]:
    fleet = Fleet(k, case.bytes_per_s)
    plans: dict[str, GraphPlan] = {}
    ms: dict[str, float] = {}
    for method in METHODS:
        at_s = time.perf_counter()
        plans[method] = plan_graph(
            case.graph, fleet, rng=np.random.default_rng(k), budget=method, bounds=bounds, prove=False
        )
        ms[method] = round((time.perf_counter() - at_s) * 1e3, 1)
    best = min(plans.values(), key=lambda plan: plan.bottleneck_s)
    at_s = time.perf_counter()
    bound = bounds.lower(fleet, best.bottleneck_s)
    ms["bound"] = round((time.perf_counter() - at_s) * 1e3, 1)
    costs_K = part_costs(case.graph, best.part_of, fleet)
    known_s = best.bottleneck_s
    if bound.part_of is not None:
        known_s = min(known_s, float(part_costs(case.graph, bound.part_of, fleet).max()))
    return {
        "kind": case.kind,
        "size": case.size,
        "operators": case.graph.count,
        "k": k,
        "io_share": round(float(1 - case.graph.work_V.sum() / costs_K.sum()), 4),
        "acyclic": all(quotient_is_acyclic(case.graph, plan.part_of) for plan in plans.values()),
        "bound": bound.reason,
        "ms": ms,
        "known": round(known_s / bound.value_s, 5),
        **{method: round(plan.bottleneck_s / bound.value_s, 5) for method, plan in plans.items()},
    }


def _ratio(rows: list[dict[str, Any]], one: str, other: str | None = None) -> float:
    """Geometric mean of one ratio, or of one over another."""
    logs = [math.log(row[one] / (row[other] if other else 1.0)) for row in rows]
    return round(math.exp(sum(logs) / len(logs)), 5) if logs else math.nan


def _all_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {method: _ratio(rows, method) for method in METHODS}


def _log_normal(rng: np.random.Generator, mean: float, sigma: float) -> float:
    return float(mean * rng.lognormal(-sigma * sigma / 2, sigma))
