"""`bsns doctor`: the swarm's nodes and links in figures, and what looks wrong with them in sentences."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from bsns.cli.console import JoinOption, JsonFlag, doing, emit, out, run, tell
from bsns.cli.tables import natural_width, print_table, table
from bsns.core.ids import PeerId, short_names
from bsns.core.snapshot import Link, Snapshot
from bsns.core.words import several, size
from bsns.swarm.doctor import Finding, findings

if TYPE_CHECKING:
    from bsns.node.snapshots import Sight
    from bsns.protocol.records import NodeRecord

MATRIX_NODES = 6
"""Up to so many nodes links are shown as a matrix where it fits the terminal, else as a list, the slowest first."""
LISTED_LINKS = 30
BROKEN = ("model", "blocks", "device")
"""Columns that may take more than one line."""


def doctor(join: JoinOption, as_json: JsonFlag = False) -> None:
    """Examine a swarm: how fast its nodes and the links between them are, and what looks wrong.

    Links show the median round trip ± its median deviation, the bandwidth, and how long ago they were measured.

    Example:
      bsns doctor --join bsns1-…
    """

    async def verb() -> None:
        with doing("loading libraries", quiet=as_json) as say:
            from bsns.node.server import ANNOUNCE_S, RECORD_LIFETIME_S
            from bsns.node.snapshots import look

            say("asking the swarm")
            sight = await look(join)
        found = findings(
            sight.records,
            sight.snapshot,
            time.time(),
            silent=sight.silent,
            lifetime_s=RECORD_LIFETIME_S,
            announce_s=ANNOUNCE_S,
        )
        if as_json:
            emit(as_dict(sight, found))
        else:
            show(sight, found)

    run(verb(), as_json=as_json)


def show(sight: Sight, found: list[Finding]) -> None:
    """For people: nodes, links, then the diagnosis."""
    records = _in_order(sight)
    if records:
        print_table(nodes_table(sight))
        square = matrix(records, sight.snapshot)
        small = len(records) <= MATRIX_NODES and natural_width(square) <= out.width
        out.print()
        print_table(square if small else links_table(records, sight.snapshot))
        out.print()
    if not found:
        out.print("Nothing looks wrong.", style="green")
        return
    out.print("What looks wrong:" if any(finding.grave for finding in found) else "What might be better:")
    for finding in found:
        style = "red" if finding.grave else "yellow"
        tell(f"- {finding.text}", style=style)


def nodes_table(sight: Sight) -> Table:
    """One row per node, in the order of the blocks."""
    records = _in_order(sight)
    models = {record.model_name for record in records}
    names = short_names(record.peer for record in records)
    one = len(models) == 1
    title = (
        Text(f"{next(iter(models))}, {several(records[0].block_count, 'block')}, {records[0].dtype}") if one else None
    )
    columns = ("node", "blocks", "device", "block\ntime", "prompt\ntoken", "memory", "cache\nleft", "sessions", "up")
    view = table(*(columns if one else ("model", *columns)), title=title, broken=BROKEN)
    for record in records:
        now = sight.answers.get(record.peer)
        state = Text("no answer", style="red") if record.peer in sight.silent else Text(_ranges(record))
        cells = (
            names[record.peer],
            state if record.state == "serving" else Text(f"{_ranges(record)} {record.state}"),
            Text(f"{record.device} ×{record.threads}"),  # Text: what others announce is no markup
            _ms((now.block_time_s if now else record.block_time_s) or None),
            _ms(record.prefill_time_s or None),
            size(record.memory_bytes) if record.memory_bytes else "–",
            str(now.cache_tokens_left if now else record.cache_tokens_left),
            str(now.sessions if now else record.sessions),
            _span(max(0.0, sight.snapshot.taken_s - record.started_s)),
        )
        view.add_row(*(cells if one else (Text(record.model_name), *cells)))
    return view


def matrix(records: list[NodeRecord], snapshot: Snapshot) -> Table:
    """Every link, and this machine's own ways in the last row."""
    names = short_names(record.peer for record in records)
    view = table("links", *(names[record.peer] for record in records))
    for row, record in enumerate(records):
        cells = [_cell(snapshot.link(record.peer, other.peer)) if n < row else "" for n, other in enumerate(records)]
        cells[row] = "·"
        view.add_row(names[record.peer], *cells)
    view.add_row("this machine", *(_cell(snapshot.client.get(record.peer)) for record in records))
    return view


def links_table(records: list[NodeRecord], snapshot: Snapshot) -> Table:
    """The links one by one, the slowest first, as many as a person reads."""
    names = short_names(record.peer for record in records)
    links: dict[tuple[str, PeerId], Link] = {(names[one], other): link for (one, other), link in snapshot.links.items()}
    links |= {("this machine", peer): link for peer, link in snapshot.client.items()}
    ordered = sorted(links.items(), key=lambda entry: -entry[1].transfer_s(16 * 1024))
    title = several(len(links), "link") + (f", the {LISTED_LINKS} slowest" if len(links) > LISTED_LINKS else "")
    view = table("from", "to", "round trip", "bandwidth", "measured", title=Text(title))
    for (one, other), link in ordered[:LISTED_LINKS]:
        view.add_row(one, names[other], _trip(link), _bandwidth(link), f"{_span(link.age_s)} ago")
    return view


def as_dict(sight: Sight, found: list[Finding]) -> dict[str, Any]:
    """The examination as `--json` prints it."""
    links = [(one, other, link) for (one, other), link in sorted(sight.snapshot.links.items())]
    links += [(PeerId("client"), peer, link) for peer, link in sorted(sight.snapshot.client.items())]
    return {
        "nodes": [_node_dict(record, sight) for record in _in_order(sight)],
        "links": [
            {
                "a": one,
                "b": other,
                "round_trip_ms": round(link.round_trip_s * 1e3, 4),
                "spread_ms": round(link.spread_s * 1e3, 4),
                "mb_per_s": round(link.bytes_per_s / 1e6, 4) if math.isfinite(link.bytes_per_s) else None,
                "age_s": round(link.age_s, 1),
            }
            for one, other, link in links
        ],
        "findings": [
            {"kind": finding.kind, "grave": finding.grave, "peers": list(finding.peers), "text": finding.text}
            for finding in found
        ],
    }


def _node_dict(record: NodeRecord, sight: Sight) -> dict[str, Any]:
    now = sight.answers.get(record.peer)
    return {
        "id": record.peer,
        "model": record.model_name,
        "ranges": [str(blocks) for blocks in record.ranges],
        "state": record.state,
        "device": record.device,
        "dtype": record.dtype,
        "threads": record.threads,
        "block_time_ms": round((now.block_time_s if now else record.block_time_s) * 1e3, 4),
        "prefill_time_ms": round(record.prefill_time_s * 1e3, 5),
        "memory_bytes": record.memory_bytes,
        "cache_tokens": record.cache_tokens,
        "cache_tokens_left": now.cache_tokens_left if now else record.cache_tokens_left,
        "sessions": now.sessions if now else record.sessions,
        "uptime_s": round(max(0.0, sight.snapshot.taken_s - record.started_s), 1),
        "error": sight.silent.get(record.peer),
    }


def _in_order(sight: Sight) -> list[NodeRecord]:
    return sorted(sight.records, key=lambda record: (record.model_name, record.start, record.end, record.peer))


def _ranges(record: NodeRecord) -> str:
    return ", ".join(str(blocks) for blocks in record.ranges)


def _cell(link: Link | None) -> str:
    return f"{_trip(link)}\n{_bandwidth(link)}\n{_span(link.age_s)} ago" if link is not None else "not measured"


def _trip(link: Link) -> str:
    trip_ms, spread_ms = link.round_trip_s * 1e3, link.spread_s * 1e3
    digits = 2 if trip_ms < 10 else 1 if trip_ms < 100 else 0
    return f"{trip_ms:.{digits}f} ± {spread_ms:.{digits}f} ms"


def _bandwidth(link: Link) -> str:
    if math.isinf(link.bytes_per_s):
        return "–"
    return f"{link.bytes_per_s / 1e9:.2g} GB/s" if link.bytes_per_s >= 1e9 else f"{link.bytes_per_s / 1e6:.3g} MB/s"


def _ms(seconds: float | None) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds is not None else "–"


def _span(seconds: float) -> str:
    for length_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
