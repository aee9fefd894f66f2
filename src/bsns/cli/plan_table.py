"""A plan in words: as tables for people, as one JSON object for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from bsns.cli.console import out, tell
from bsns.cli.tables import print_table, table
from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, short_names
from bsns.core.memory import MemoryUse
from bsns.core.plan import Plan
from bsns.core.snapshot import ModelShape, NodeView, Snapshot
from bsns.core.words import several, size
from bsns.planning.account import advice, against, proof, speeds
from bsns.planning.memory import stage_memory

if TYPE_CHECKING:
    from bsns.cli.plan import Present

MAX_REASONS = 12


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a planned range will take of a node's memory."""

    blocks: BlockRange
    node: NodeView
    use: MemoryUse


def footprints(plan: Plan, snapshot: Snapshot, shape: ModelShape, cache_tokens: int) -> list[Footprint]:
    """One for every stage and every node that is to hold it, in the plan's order."""
    nodes = {node.peer: node for node in snapshot.nodes}
    return [
        Footprint(stage.blocks, nodes[peer], stage_memory(stage.blocks, nodes[peer], shape, cache_tokens))
        for stage in plan.stages
        for peer in stage.peers
    ]


def show(plan: Plan, snapshot: Snapshot, present: Present | None, memory: Sequence[Footprint]) -> None:
    """Print a plan: its stages, its speed, its proof, what it was compared with, and what it assumed."""
    names = short_names(
        [*(node.peer for node in snapshot.nodes), *((hop.peer for hop in present.trial.route) if present else ())]
    )
    print_table(_stages(plan, snapshot, names))
    out.print()
    print_table(_memory(memory, names))
    out.print()
    tell(f"predicted: {speeds(plan)}")
    tell(proof(plan))
    if present is not None:
        predicted = present.predicted_tokens_per_s
        beside = f", predicted {predicted:.1f}" if predicted is not None else ""
        hops = " → ".join(f"{names[hop.peer]} {hop.blocks}" for hop in present.trial.route)
        tell(f"the swarm as it is ({hops}), one stream: measured {present.trial.tokens_per_s:.1f} tokens/s{beside}")
    if plan.alternatives:
        out.print()
        print_table(_alternatives(plan))
        out.print()
    for line in (*_left_out(plan, names), *advice(plan)):
        tell(line, style="yellow")
    for assumption in plan.assumptions:
        tell(f"assumed: {assumption}", style="dim")


def as_dict(plan: Plan, present: Present | None, memory: Sequence[Footprint]) -> dict[str, Any]:
    """The plan as `--json` prints it. Times in milliseconds."""
    return {
        "model": plan.model_name,
        "blocks": plan.block_count,
        "objective": {"bottleneck": plan.objective.bottleneck, "latency": plan.objective.latency},
        "stages": [
            {
                "range": str(stage.blocks),
                "node": stage.peer,
                "replicas": list(stage.replicas),
                "compute_ms": round(stage.compute_s * 1e3, 4),
                "transfer_ms": round(stage.transfer_s * 1e3, 4),
            }
            for stage in plan.stages
        ],
        "memory": [
            {
                "node": place.node.peer,
                "range": str(place.blocks),
                "dtype": place.node.dtype,
                "quant": place.node.quant,
                "kv": place.node.kv,
                "baseline_bytes": place.node.baseline_bytes or None,
                "weight_bytes": place.use.weight_bytes,
                "cache_bytes": place.use.promised_bytes,
                "predicted_bytes": place.use.full_bytes,
                "resident_bytes": place.node.resident_bytes or None,
            }
            for place in memory
        ],
        "left_out": [{"node": node.peer, "reason": node.reason} for node in plan.left_out],
        "bottleneck_ms": plan.bottleneck_s * 1e3,
        "latency_ms": plan.latency_s * 1e3,
        "lower_bound_ms": plan.lower_bound_s * 1e3,
        "gap": plan.gap,
        "method": plan.method,
        "tokens_per_s": {str(streams): plan.tokens_per_s(streams) for streams in (1, len(plan.stages))},
        "alternatives": [
            {"name": other.name, "bottleneck_ms": _ms(other.bottleneck_s), "latency_ms": _ms(other.latency_s)}
            | ({"note": other.note} if other.note else {})
            for other in plan.alternatives
        ],
        "assumptions": list(plan.assumptions),
        "advice": advice(plan),
        "present": None
        if present is None
        else {
            "predicted_tokens_per_s": present.predicted_tokens_per_s,
            "measured_tokens_per_s": present.trial.tokens_per_s,
            "route": [{"node": hop.peer, "range": str(hop.blocks)} for hop in present.trial.route],
        },
    }


def _stages(plan: Plan, snapshot: Snapshot, names: Mapping[PeerId, str]) -> Table:
    view = table(
        *("blocks", "node", "compute", "way in", "replicas", "now holds"),
        title=Text(f"{plan.model_name}, {several(plan.block_count, 'block')}, {several(len(snapshot.nodes), 'node')}"),
        broken=("replicas", "now holds"),
    )
    for stage in plan.stages:
        node = snapshot.node(stage.peer)
        view.add_row(
            str(stage.blocks),
            Text(names[stage.peer]),  # Text: what a file calls a node is no markup
            f"{stage.compute_s * 1e3:.2f} ms",
            f"{stage.transfer_s * 1e3:.2f} ms",
            Text(_named([names[peer] for peer in stage.replicas]) or "–"),
            ", ".join(map(str, node.held)) if node and node.held else "–",
        )
    return view


def _memory(memory: Sequence[Footprint], names: Mapping[PeerId, str]) -> Table:
    view = table(
        *("blocks", "node", "precision", "process", "weights", "cache", "in all", "now"),
        title="memory once all of the cache is used; now: what the process takes",
        broken=("precision",),
    )
    for place in memory:
        view.add_row(
            str(place.blocks),
            Text(names[place.node.peer]),
            Text(precision(place.node.dtype, place.node.quant, place.node.kv)),
            _size(place.node.baseline_bytes),
            size(place.use.weight_bytes),
            size(place.use.promised_bytes),
            size(place.use.full_bytes),
            _size(place.node.resident_bytes),
        )
    return view


def precision(dtype: str, quant: str, kv: str) -> str:
    """What a node computes in, and what it keeps in fewer bits."""
    kept = [f"{what} {kind}" for what, kind in (("weights", quant), ("cache", kv)) if kind != "none"]
    return ", ".join((dtype, *kept))


def _size(size_bytes: int) -> str:
    """A size that may be unknown."""
    return size(size_bytes) if size_bytes else "–"


def _alternatives(plan: Plan) -> Table:
    view = table(
        *("instead", "slowest\nstage", "one token", "one stream", "against the plan"), broken=("against the plan",)
    )
    view.add_row(
        "this plan", f"{plan.bottleneck_s * 1e3:.2f} ms", f"{plan.latency_s * 1e3:.2f} ms", _per_s(plan.latency_s), ""
    )
    for other in plan.alternatives:
        view.add_row(
            other.name,
            f"{other.bottleneck_s * 1e3:.2f} ms" if other.bottleneck_s is not None else "–",
            f"{other.latency_s * 1e3:.2f} ms" if other.latency_s is not None else "–",
            _per_s(other.latency_s),
            Text(against(plan, other)),
        )
    return view


def _left_out(plan: Plan, names: Mapping[PeerId, str]) -> list[str]:
    lines = [f"left out {names[node.peer]}: {node.reason}" for node in plan.left_out[:MAX_REASONS]]
    more = len(plan.left_out) - MAX_REASONS
    return [*lines, f"and {more} more are left out (--json names them)"] if more > 0 else lines


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _per_s(latency_s: float | None) -> str:
    return f"{1 / latency_s:.1f} tokens/s" if latency_s else "–"


def _ms(seconds: float | None) -> float | None:
    return seconds * 1e3 if seconds is not None else None
