"""How fast a node is: what a block takes it for a single token. Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from bsns.core.plan import block_times

MEASURED = 15
"""Steps of a single token from which a node knows how fast it is: few, so that it says soon that it has become slow."""
FAR_OFF = 2.0


class Speed:
    """The median of what a block took lately, in seconds."""

    def __init__(self, block_time_s: float) -> None:
        self.set(block_time_s)

    def set(self, block_time_s: float) -> None:
        """Forget what it took before."""
        self._times_s = deque([block_time_s] * (MEASURED // 2 + 1), maxlen=MEASURED)
        self.block_time_s = block_time_s

    def note(self, times_s: Sequence[float]) -> None:
        """A block took so long just now."""
        self._times_s.extend(times_s)
        self.block_time_s = statistics.median(self._times_s)

    def measured(self, times_s: Sequence[float]) -> None:
        """A node has measured itself: few of these against many old ones would leave it for long with what it was."""
        now_s = statistics.median(times_s)
        if not self.block_time_s / FAR_OFF <= now_s <= self.block_time_s * FAR_OFF:
            self.set(now_s)
        self.note(times_s)

    def expected_s(self, blocks: int, rows: int) -> float:
        """What a batch is going to take; a node that becomes slow believes so at once."""
        return max(self.block_time_s, self._times_s[-1]) * blocks * block_times(rows)
