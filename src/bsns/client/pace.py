"""Pace: how long an answer's turns usually take, and which of its stages is much slower than it was, or than its node
says. Pure."""

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
"""A stage that computes for less is left alone, however quick it was before, or should be."""


MOST_SLOW = 3
"""Of one answer's stages so many at most are found slow by what their nodes say."""


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

    def __init__(self, says_ms: Sequence[float] = ()) -> None:
        """`says_ms`: what each stage's node says that a token takes it, 0 where that is not known."""
        self._turns = _Usual()
        self._beside = _Usual()
        """What a turn takes beside its stages' computing: ways, and waiting."""
        self._stages: list[_Usual] = []
        self._says_ms = says_ms
        self._found_slow = 0

    @property
    def usual_s(self) -> float:
        """What a turn takes when nothing is wrong, no more than its nodes say; 0 where there has been none yet."""
        said_s = self.said_s + self._beside.so_far / 1e3 if self.said_s else math.inf
        return min(self._turns.so_far / 1e3, said_s)

    @property
    def said_s(self) -> float:
        """What the stages' nodes say that a token takes them; 0 where one of them says nothing."""
        return sum(self._says_ms) / 1e3 if all(self._says_ms) else 0.0

    def turned(self, total_ms: float, computing_ms: Sequence[float]) -> int | None:
        """Take note of a turn and of how long each stage computed for it; the stage that straggles, if one does."""
        self._turns.add(total_ms)
        self._beside.add(max(0.0, total_ms - sum(computing_ms)))
        if len(computing_ms) != len(self._stages):
            self._stages = [_Usual() for _ in computing_ms]
        worst: tuple[float, int | None] = (SLOW_FACTOR, None)
        for number, (stage, took_ms) in enumerate(zip(self._stages, computing_ms, strict=True)):
            stage.add(took_ms)
            due_ms = min(stage.least, self._said_ms(number))
            if stage.now >= SLOW_MS and stage.now > worst[0] * due_ms:
                worst = stage.now / max(due_ms, 1e-3), number
        return worst[1]

    def rerouted(self, says_ms: Sequence[float], *, slow: bool = False) -> None:
        """The stages are others: what they take has to be learnt anew. `slow`: a slow one was replaced, or kept. Where
        that happens again and again all are, by what they say, and others would be as well: it is believed no more."""
        self._stages = []
        self._found_slow += slow
        self._says_ms = says_ms if self._found_slow < MOST_SLOW else ()

    def _said_ms(self, stage: int) -> float:
        said_ms = self._says_ms[stage] if stage < len(self._says_ms) else 0.0
        return said_ms if said_ms > 0 else math.inf
