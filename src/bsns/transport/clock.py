"""Clocks: the machine's own, or in its place a simulated swarm's."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What time it is, for everything that waits, measures, or notes when it was."""

    def now_s(self) -> float:
        """Seconds since some moment in the past; never goes back, whatever happens to the time of day."""
        ...

    def unix_s(self) -> float:
        """Unix time, which peers compare."""
        ...


class MachineClock:
    """See Clock."""

    def now_s(self) -> float:
        return time.perf_counter()

    def unix_s(self) -> float:
        return time.time()


MACHINE_CLOCK = MachineClock()
