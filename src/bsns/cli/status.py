"""`bsns status`: the swarm as a table."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from bsns.cli import tables
from bsns.cli.console import JoinOption, JsonFlag, doing, emit, out, run, tell
from bsns.cli.plan_table import precision
from bsns.cli.up import in_block_order
from bsns.core.blocks import missing_blocks
from bsns.core.ids import short_names
from bsns.core.memory import MemoryUse
from bsns.core.words import several, size

if TYPE_CHECKING:
    from bsns.node.view import NodeStatus


def status(join: JoinOption, as_json: JsonFlag = False) -> None:
    """Show the swarm's nodes, what each holds, and what is missing.

    Example:
      bsns status --join bsns1-…
    """

    async def verb() -> None:
        with doing("loading libraries", quiet=as_json) as say:
            from bsns.node.observe import observe

            say("asking the swarm")
            nodes = in_block_order(await observe(join))
        if as_json:
            emit({"nodes": [as_dict(node) for node in nodes], "missing": missing(nodes)})
            return
        if not nodes:
            out.print("The swarm has no nodes; start one with: bsns serve MODEL --join INVITE", highlight=False)
            return
        tables.print_table(table(nodes))
        out.print()
        tables.print_table(memory_table(nodes))
        out.print()
        for line in calls(nodes):
            tell(line, style="yellow")
        for line in reasons(nodes):
            tell(line)
        for node in nodes:
            if node.error is not None:
                tell(node.error, style="red")

    run(verb(), as_json=as_json)


def table(nodes: list[NodeStatus]) -> Table:
    """One row per node, in the order of the blocks; what all have in common is in the title."""
    models = {node.record.model_name for node in nodes}
    kinds = {_precision(node) for node in nodes}
    one, alike = len(models) == 1, len(models) == len(kinds) == 1
    title = ", ".join((models.pop(), several(nodes[0].record.block_count, "block"), *(kinds if alike else ())))
    columns = ("node", "blocks", "device", "cache left", "sessions", "block\ntime", "round\ntrip")
    view = tables.table(
        *(columns if one else ("model", *columns)),
        title=Text(title) if one else None,
        broken=("model", "blocks", "device"),
    )
    names = short_names(node.record.peer for node in nodes)
    for node in nodes:
        record, now = node.record, node.now
        blocks = Text(f"{record.blocks} {record.state}" if record.state != "serving" else str(record.blocks))
        device = f"{record.device} {name_of(record.executor)}"
        cells = (
            names[record.peer],
            blocks if node.error is None else Text(f"{record.blocks} no answer", style="red"),
            Text(device if alike else f"{device}, {_precision(node)}"),  # Text: what others announce is no markup
            f"{now.cache_tokens_left if now else record.cache_tokens_left} of {record.cache_tokens}",
            str(now.sessions) if now else "–",
            f"{(now.block_time_s if now else record.block_time_s) * 1e3:.2f} ms",
            f"{node.round_trip_s * 1e3:.2f} ms" if node.round_trip_s is not None else "–",
        )
        view.add_row(*(cells if one else (Text(record.model_name), *cells)))
    return view


def memory_table(nodes: list[NodeStatus]) -> Table:
    """What each node reckons to have in memory, beside what its process takes."""
    view = tables.table(
        *("node", "process", "weights", "cache", "journals", "in all", "resident", "full"),
        title="memory; in all: what should be resident now, full: once all of the cache is used",
    )
    names = short_names(node.record.peer for node in nodes)
    for node in nodes:
        record, use = node.record, node.now.memory if node.now else None
        parts = (use.baseline_bytes, use.weight_bytes, use.kv_bytes, use.journal_bytes, use.now_bytes) if use else ()
        view.add_row(
            names[record.peer],
            *(map(size, parts) if use else ["–"] * 5),
            size(node.now.rss_bytes if node.now else record.rss_bytes),
            size(use.full_bytes) if use else "–",
        )
    return view


def _precision(node: NodeStatus) -> str:
    return precision(node.record.dtype, node.record.quant, node.record.kv)


def name_of(executor: str) -> str:
    """An executor without the reason why it was taken."""
    return executor.partition(":")[0]


def reasons(nodes: list[NodeStatus]) -> list[str]:
    """Why nodes do not compute as they would best, a line each."""
    names = short_names(node.record.peer for node in nodes)
    return [
        f"{names[node.record.peer]} computes with {node.record.executor}"
        for node in nodes
        if ":" in node.record.executor
    ]


def missing(nodes: list[NodeStatus]) -> dict[str, list[str]]:
    """For each model that is not fully covered the ranges nobody serves; a node that does not answer serves none."""
    models = {node.record.model: node.record for node in nodes}
    gaps = {
        record.model_name: missing_blocks(
            (
                blocks
                for n in nodes
                if n.record.model == model and n.record.state == "serving" and not n.error
                for blocks in n.record.ranges
            ),
            record.block_count,
        )
        for model, record in models.items()
    }
    return {name: [str(gap) for gap in found] for name, found in gaps.items() if found}


def calls(nodes: list[NodeStatus]) -> list[str]:
    """What a model lacks and how to help it, a line each."""
    return [
        f"nobody serves blocks {', '.join(gaps)} of {model}; "
        f"start a node with: bsns serve {shlex.quote(model)} --blocks {gaps[0]} --join INVITE"
        for model, gaps in missing(nodes).items()
    ]


def as_dict(node: NodeStatus) -> dict[str, Any]:
    """A node as `--json` prints it."""
    record, now = node.record, node.now
    return {
        "id": record.peer,
        "model": record.model_name,
        "range": str(record.blocks),
        "state": record.state,
        "device": record.device,
        "dtype": record.dtype,
        "executor": record.executor,
        "threads": record.threads,
        "cache_tokens": record.cache_tokens,
        "cache_tokens_left": now.cache_tokens_left if now else record.cache_tokens_left,
        "sessions": now.sessions if now else None,
        "block_time_ms": round((now.block_time_s if now else record.block_time_s) * 1e3, 4),
        "rss_mb": round((now.rss_bytes if now else record.rss_bytes) / 1e6, 1),
        "quant": record.quant,
        "kv": record.kv,
        "memory": _memory_dict(now.memory, now.rss_bytes) if now else None,
        "round_trip_ms": round(node.round_trip_s * 1e3, 3) if node.round_trip_s is not None else None,
        "error": node.error,
    }


def _memory_dict(use: MemoryUse, resident_bytes: int) -> dict[str, int]:
    return {
        "baseline_bytes": use.baseline_bytes,
        "weight_bytes": use.weight_bytes,
        "kv_bytes": use.kv_bytes,
        "journal_bytes": use.journal_bytes,
        "predicted_bytes": use.now_bytes,
        "resident_bytes": resident_bytes,
        "full_bytes": use.full_bytes,
    }
