"""Pace: how long an answer's turns usually take, and which of its stages has become much slower than it was. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from bsns.client.fault import SLOW_FACTOR

WINDOW = 9
"""Turns whose median counts; of all such medians the least is what is usual: a stage that becomes slow does not become
usual."""
LATEST = 3
"""Turns in a row in which a stage has to be slow."""
SLOW_MS = 300.0
"""A stage that computes for less is left alone, however quick it was before."""


class _Usual:
    """The least median of so many values in a row."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self.least = math.inf
        """inf before there are enough values."""

    def add(self, value: float) -> None:
        self._latest.append(value)
        if len(self._latest) == WINDOW:
            self.least = min(self.least, statistics.median(self._latest))

    @property
    def so_far(self) -> float:
        """The median of few values, where there are no more; 0 without any."""
        if math.isfinite(self.least):
            return self.least
        return statistics.median(self._latest) if self._latest else 0.0

    @property
    def now(self) -> float:
        """What not one of the latest few was below."""
        latest = list(self._latest)[-LATEST:]
        return min(latest) if len(latest) == LATEST else 0.0


class Pace:
    """One answer's pace."""

    def __init__(self) -> None:
        self._turns = _Usual()
        self._stages: list[_Usual] = []

    @property
    def usual_s(self) -> float:
        """What a turn takes when nothing is wrong; 0 where that is not known yet."""
        return self._turns.so_far / 1e3

    def turned(self, total_ms: float, computing_ms: Sequence[float]) -> int | None:
        """Take note of a turn and of how long each stage computed for it; the stage that straggles, if one does."""
        self._turns.add(total_ms)
        if len(computing_ms) != len(self._stages):
            self._stages = [_Usual() for _ in computing_ms]
        worst: tuple[float, int | None] = (SLOW_FACTOR, None)
        for number, (stage, took_ms) in enumerate(zip(self._stages, computing_ms, strict=True)):
            stage.add(took_ms)
            if stage.now >= SLOW_MS and stage.now > worst[0] * stage.least:
                worst = stage.now / max(stage.least, 1e-3), number
        return worst[1]

    def rerouted(self) -> None:
        """The stages are others: what they take has to be learnt anew."""
        self._stages = []
