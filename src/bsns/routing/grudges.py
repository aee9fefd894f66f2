"""Grudges: peers that failed us lately are passed over for a while, longer each time, and forgiven. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bsns.core.errors import BsnsError, CacheFull, NotHere, Remedy
from bsns.core.ids import PeerId

FIRST_S = 5.0
LONGEST_S = 300.0
"""A peer is passed over for so long after its first failure, twice as long after each further one, up to this."""
FORGIVEN_S = 600.0
"""A peer that has not failed for so long has a clean record."""
MOST_HELD = 1000
"""Beyond this the oldest are forgotten: whoever makes up peers shall not fill our memory."""


@dataclass(slots=True)
class _Grudge:
    until_s: float
    times: int


class Grudges:
    """Who is passed over, where others can do the same."""

    def __init__(self) -> None:
        self._held: dict[PeerId, _Grudge] = {}

    def blame(self, peer: PeerId, error: BsnsError, now_s: float) -> None:
        """A peer failed us. One that has no room, or holds other blocks, did not; nor is one failure counted twice."""
        if isinstance(error, (CacheFull, NotHere)) or error.remedy is Remedy.TELL_USER:
            return
        known = self._held.get(peer)
        if known is not None and now_s < known.until_s:
            return
        times = known.times if known is not None and now_s - known.until_s < FORGIVEN_S else 0
        self._held.pop(peer, None)  # the newest stands last
        self._held[peer] = _Grudge(now_s + min(LONGEST_S, FIRST_S * 2**times), min(times + 1, 10))
        while len(self._held) > MOST_HELD:
            del self._held[next(iter(self._held))]

    def forgive(self, peers: Collection[PeerId]) -> None:
        """Hold nothing against these any more."""
        for peer in peers:
            self._held.pop(peer, None)

    def passed_over(self, now_s: float) -> set[PeerId]:
        """Whom not to choose now."""
        for peer in [peer for peer, held in self._held.items() if now_s - held.until_s > FORGIVEN_S]:
            del self._held[peer]
        return {peer for peer, held in self._held.items() if now_s < held.until_s}
