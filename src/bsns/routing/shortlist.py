"""The shortlist: of a large swarm's nodes those that a client asks how far they are, and chooses among. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId
from bsns.protocol.records import NodeRecord
from bsns.routing.load import slowdown

SILENT_S = 1e6
ASKED = 64
"""Of up to so many nodes all are asked."""
HOLDERS = 16
"""Of more, the likeliest, until every block has so many holders among them that have room."""


def shortlist(
    records: Sequence[NodeRecord],
    blocks: BlockRange,
    *,
    needed_tokens: int,
    avoid: Collection[PeerId],
    sessions: Mapping[PeerId, int],
    round_trips_s: Mapping[PeerId, float],
    silent: Collection[PeerId],
    whim: Callable[[PeerId], float],
) -> list[NodeRecord]:
    """The nodes that are likeliest to be on the best chain over `blocks`, in the records' order; all of a small swarm.

    A node's merit is its time for a block, more while it is busy, and its part of the round trip, where that is not
    known the usual one; those that are silent come last. `whim` (0 to 1, the client's own) makes a node look slower by
    up to a half, so that clients do not all ask the same ones.
    """
    if len(records) <= ASKED:
        return list(records)
    usual_s = statistics.median(round_trips_s.values()) if round_trips_s else 0.0

    def merit_s(record: NodeRecord) -> float:
        peer = record.peer
        longest = max(map(len, record.ranges))
        compute_s = record.block_time_s * slowdown(sessions.get(peer, 0)) * (1 + whim(peer) / 2)
        way_s = SILENT_S if peer in silent else round_trips_s.get(peer, usual_s) / 2
        return compute_s + way_s / longest

    fitting = [
        record
        for record in records
        if record.state == "serving"
        and record.cache_tokens_left >= needed_tokens
        and record.peer not in avoid
        and any(held.start < blocks.end and blocks.start < held.end for held in record.ranges)
    ]
    holders = dict.fromkeys(blocks, 0)
    wanting = len(holders)
    kept: set[PeerId] = set()
    for record in sorted(fitting, key=merit_s):
        held = [block for there in record.ranges for block in there if holders.get(block, HOLDERS) < HOLDERS]
        if not held:
            continue
        kept.add(record.peer)
        for block in held:
            holders[block] += 1
            wanting -= holders[block] == HOLDERS
        if not wanting:
            break
    return [record for record in records if record.peer in kept]
