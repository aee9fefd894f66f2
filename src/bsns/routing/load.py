"""Load: what a block takes on a node that serves other sessions as well."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bsns.core.ids import PeerId
from bsns.core.plan import block_times
from bsns.protocol.records import NodeRecord


def slowdown(sessions: int) -> float:
    """How much longer a step takes where so many other sessions step with it in one batch."""
    return block_times(1 + sessions)


class Loads:
    """How many sessions each node has: those its record tells of, and our own since.

    A record counts ours that were open when it was made, which for a fresh one are those open when it is first seen.
    """

    def __init__(self) -> None:
        self._own: dict[PeerId, int] = {}
        self._others: dict[PeerId, tuple[NodeRecord, int]] = {}

    def see(self, records: Collection[NodeRecord]) -> None:
        """Take note of what records tell."""
        seen = {record.peer: self._others.get(record.peer) for record in records}
        self._others = {
            record.peer: known
            if (known := seen[record.peer]) is not None and known[0] == record
            else (record, max(0, record.sessions - self._own.get(record.peer, 0)))
            for record in records
        }

    def add(self, peers: Collection[PeerId]) -> None:
        """A session of ours takes these."""
        for peer in peers:
            self._own[peer] = self._own.get(peer, 0) + 1

    def remove(self, peers: Collection[PeerId]) -> None:
        """It has ended. Where we have none, nothing changes."""
        for peer in peers:
            left = self._own.pop(peer, 0) - 1
            if left > 0:
                self._own[peer] = left

    def sessions(self) -> Mapping[PeerId, int]:
        """Open sessions by node, as far as we know."""
        peers = self._own.keys() | self._others.keys()
        return {peer: self._own.get(peer, 0) + (self._others[peer][1] if peer in self._others else 0) for peer in peers}
