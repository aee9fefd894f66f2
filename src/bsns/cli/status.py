"""`bsns status`: the swarm as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from bsns.cli.console import JoinOption, JsonFlag, doing, emit, out, run
from bsns.core.blocks import missing_blocks

if TYPE_CHECKING:
    from bsns.node.view import NodeStatus


def status(join: JoinOption, as_json: JsonFlag = False) -> None:
    """Show the swarm's nodes, what each holds, and what is missing.

    Example: bsns status --join bsns1-…
    """

    async def verb() -> None:
        from bsns.node.observe import observe

        with doing("asking the swarm", quiet=as_json):
            nodes = await observe(join)
        if as_json:
            emit({"nodes": [as_dict(node) for node in nodes], "missing": missing(nodes)})
            return
        view = Table("node", "model", "device", "blocks", "state", "executor", "cache left", "block time", "round trip")
        for node in nodes:
            record = node.record
            left = node.now.cache_tokens_left if node.now else record.cache_tokens_left
            time_s = node.now.block_time_s if node.now else record.block_time_s
            view.add_row(
                f"…{record.peer[-8:]}",
                record.model_name,
                f"{record.device} {record.dtype}",
                str(record.blocks),
                record.state if node.error is None else f"[red]{node.error}[/]",
                record.executor,
                f"{left} of {record.cache_tokens}",
                f"{time_s * 1e3:.2f} ms",
                f"{node.round_trip_s * 1e3:.2f} ms" if node.round_trip_s is not None else "–",
            )
        out.print(view if nodes else "The swarm has no nodes.")
        for model, gaps in missing(nodes).items():
            out.print(f"[yellow]{model}: nobody serves blocks {', '.join(gaps)}[/]")

    run(verb(), as_json=as_json)


def missing(nodes: list[NodeStatus]) -> dict[str, list[str]]:
    """For each model that is not fully covered the ranges nobody serves."""
    models = {node.record.model: node.record for node in nodes}
    gaps = {
        record.model_name: missing_blocks(
            (n.record.blocks for n in nodes if n.record.model == model and n.record.state == "serving" and not n.error),
            record.block_count,
        )
        for model, record in models.items()
    }
    return {name: [str(gap) for gap in found] for name, found in gaps.items() if found}


def as_dict(node: NodeStatus) -> dict[str, Any]:
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
        "round_trip_ms": round(node.round_trip_s * 1e3, 3) if node.round_trip_s is not None else None,
        "error": node.error,
    }
