"""How often a key may ask and how many answers it may have under way; pure, time comes in as `now_s`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may do; None is no limit."""

    requests_per_minute: int | None = None
    answers: int | None = None
    """At once; a request for several choices has as many answers."""


@dataclass(slots=True)
class _Use:
    left: float
    """Requests that may come at once: a token bucket, filled evenly to a minute's worth."""
    filled_s: float
    answers: int = 0


class Limits:
    """Who has asked how often lately. Keys are named; their names are the gateway operator's."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def ask(self, name: str, allowance: Allowance, now_s: float) -> float:
        """0.0 and the request is counted, or in how many seconds the next may come."""
        most = allowance.requests_per_minute
        if most is None:
            return 0.0
        use = self._use(name, most, now_s)
        use.left = min(float(most), use.left + (now_s - use.filled_s) * most / 60)
        use.filled_s = now_s
        if use.left < 1:
            return (1 - use.left) * 60 / most
        use.left -= 1
        return 0.0

    def begin(self, name: str, allowance: Allowance, answers: int) -> bool:
        """Whether so many more answers may be under way; if so they are until `end`."""
        use = self._use(name, allowance.requests_per_minute or 0, 0.0)
        if allowance.answers is not None and use.answers + answers > allowance.answers:
            return False
        use.answers += answers
        return True

    def end(self, name: str, answers: int) -> None:
        self._uses[name].answers -= answers

    def _use(self, name: str, most: int, now_s: float) -> _Use:
        return self._uses.setdefault(name, _Use(float(most), now_s))
