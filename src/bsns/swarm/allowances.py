"""Allowances: so much at once, so much for every second. Pure: time comes in as an argument."""

from __future__ import annotations

from bsns.core.errors import BadFrame
from bsns.core.ids import PeerId

LEAST_BYTES = 4096
"""What a probe counts for at least: an answer costs something too."""
PEER_BYTES_PER_S = 256 * 1024.0
PEER_BURST_BYTES = 1024 * 1024.0
"""A peer may measure our link once at full length (swarm.bandwidth: 0.9 MB) at any time, not always."""
ALL_BYTES_PER_S = 2 * 1024 * 1024.0
ALL_BURST_BYTES = 16 * 1024 * 1024.0
"""All peers together."""
REFUSALS_PER_S = 1.0
MAX_REFUSALS = 64
"""A peer that goes on so often without waiting as it was told means no probe."""
MAX_PEERS = 4096


class Allowance:
    """A leaky bucket: `per_s` of anything for every second, `burst` of it at once."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._spent = 0.0
        self._at_s = 0.0

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until so much may be spent; 0 if now. What is more than the burst may be once the bucket is full."""
        return max(0.0, self._left_over(now_s) + min(amount, self._burst) - self._burst) / self._per_s

    def spend(self, amount: float, now_s: float) -> None:
        """Spend it, whether it may be or not: what it cost is sometimes known only afterwards."""
        self._spent, self._at_s = self._left_over(now_s) + amount, now_s

    def idle(self, now_s: float) -> bool:
        """Whether nothing is remembered of what was spent."""
        return self._left_over(now_s) == 0.0

    def _left_over(self, now_s: float) -> float:
        return max(0.0, self._spent - max(0.0, now_s - self._at_s) * self._per_s)


class ProbeLimiter:
    """How much of others' probes a node takes, so that they cannot keep it from its work."""

    def __init__(self) -> None:
        self._all = Allowance(ALL_BYTES_PER_S, ALL_BURST_BYTES)
        self._peers: dict[PeerId, Allowance] = {}
        self._refusals: dict[PeerId, Allowance] = {}

    def wait_s(self, peer: PeerId, size: int, now_s: float) -> float:
        """0 if a probe of so many bytes is taken, else how long `peer` shall wait.

        Raises BadFrame for one who goes on all the same.
        """
        size = max(size, LEAST_BYTES)
        own = self._peers.get(peer)
        if own is None:
            if len(self._peers) >= MAX_PEERS:
                self._forget(now_s)
            own = self._peers[peer] = Allowance(PEER_BYTES_PER_S, PEER_BURST_BYTES)
        wait_s = max(own.wait_s(size, now_s), self._all.wait_s(size, now_s))
        if wait_s == 0.0:
            own.spend(size, now_s)
            self._all.spend(size, now_s)
            return 0.0
        refusals = self._refusals.setdefault(peer, Allowance(REFUSALS_PER_S, MAX_REFUSALS))
        if refusals.wait_s(1, now_s) > 0:
            raise BadFrame(f"{MAX_REFUSALS} probes more than this node takes; wait as it says")
        refusals.spend(1, now_s)
        return wait_s

    def _forget(self, now_s: float) -> None:
        self._peers = {peer: own for peer, own in self._peers.items() if not own.idle(now_s)}
        self._refusals = {peer: own for peer, own in self._refusals.items() if not own.idle(now_s)}
