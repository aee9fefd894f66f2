"""Bandwidth from timed probes of growing size: which size comes next, and what their times say. Pure."""

from __future__ import annotations

import math

from bsns.protocol.probing import MAX_PROBE_BYTES

FIRST_BYTES = 4096
FACTOR = 4
MOST_S = 0.1
"""No probe is sent that is expected to keep the link longer; the smallest has to be tried to know."""
TRIES = 3
"""How often a size is tried before it is believed to be slow. The least time counts: a connection that was idle sends
little at first (slow start, RFC 5681), and a busy node answers late."""
HOPELESS_S = 1.0
"""A probe that took so long is not tried again."""
FLOOR_S = 20e-6
"""Differences below this are noise, and mean: at least so much."""


class Growth:
    """One measurement: ask for `size`, send that much, tell how long the answer `took`; until `size` is None.

    `round_trip_s` is the least one known. What a probe takes beyond it, or beyond an earlier probe that took less, it
    has spent on the link.
    """

    def __init__(self, round_trip_s: float) -> None:
        self.size: int | None = FIRST_BYTES
        self.busy_s = 0.0
        """How long the link was kept busy in all."""
        self._round_trip_s = round_trip_s
        self._tries = 0
        self._best_s = math.inf
        self._measured = 0

    def took(self, elapsed_s: float) -> None:
        """The probe of `size` was answered after so long."""
        assert self.size is not None
        self._round_trip_s = min(self._round_trip_s, elapsed_s)  # the pings may have met a busy node
        spent_s = max(elapsed_s - self._round_trip_s, FLOOR_S)
        self.busy_s += spent_s
        self._measured = self.size
        self._tries += 1
        self._best_s = min(self._best_s, spent_s)
        if self.size < MAX_PROBE_BYTES and FACTOR * self._best_s <= MOST_S:
            self.size, self._tries, self._best_s = min(FACTOR * self.size, MAX_PROBE_BYTES), 0, math.inf
        elif self._tries >= TRIES or self._best_s > HOPELESS_S:
            self.size = None

    @property
    def bytes_per_s(self) -> float:
        """What the largest size that was tried says. Only after `size` has become None."""
        assert self.size is None
        return self._measured / self._best_s
