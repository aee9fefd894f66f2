"""The snapshot of a swarm: its nodes' records, and what they measured of each other, as one frozen view. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from bsns.core.ids import PeerId
from bsns.core.snapshot import Link, NodeView, Pair, Snapshot, pair, slower
from bsns.protocol.records import NodeRecord


def snapshot(records: Sequence[NodeRecord], now_s: float, client: Mapping[PeerId, Link] | None = None) -> Snapshot:
    """What `records` say at `now_s` (Unix time); `client` is what whoever looks has measured of its own ways.

    A link that both ends measured counts as the slower of the two. A node whose block time is not known yet is not in.
    """
    nodes = tuple(node_view(record, now_s) for record in records if record.block_time_s > 0)
    here = {node.peer for node in nodes}
    return Snapshot(
        now_s,
        nodes,
        MappingProxyType(_links(records, here, now_s)),
        MappingProxyType({peer: link for peer, link in (client or {}).items() if peer in here}),
    )


def node_view(record: NodeRecord, now_s: float) -> NodeView:
    """A node as its record shows it."""
    return NodeView(
        peer=record.peer,
        block_time_s=record.block_time_s,
        memory_bytes=record.memory_bytes,
        prefill_time_s=record.prefill_time_s,
        device=record.device,
        dtype=record.dtype,
        threads=record.threads,
        held=record.ranges,
        serving=record.state == "serving",
        cache_tokens=record.cache_tokens,
        cache_tokens_left=record.cache_tokens_left,
        uptime_s=max(0.0, now_s - record.started_s),
        price=record.price,
        quant=record.quant,
        kv=record.kv,
        baseline_bytes=record.baseline_bytes,
        resident_bytes=record.rss_bytes,
    )


def _links(records: Iterable[NodeRecord], here: set[PeerId], now_s: float) -> dict[Pair, Link]:
    links: dict[Pair, Link] = {}
    for record in records:
        for entry in record.links:
            if record.peer not in here or entry.peer not in here or entry.peer == record.peer:
                continue
            age_s = max(0.0, now_s - entry.measured_s)
            link = Link(entry.round_trip_s, entry.bytes_per_s, entry.spread_s, age_s)
            key = pair(record.peer, entry.peer)
            links[key] = slower(links[key], link) if key in links else link
    return links
