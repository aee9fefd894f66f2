"""Answers under way: whose they are, how far they have come, and which nodes they go through."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from bsns.client.pieces import Stats


@dataclass(frozen=True, slots=True)
class RunningAnswer:
    """`id` is drawn here and means nothing elsewhere: nobody reaches a session by it."""

    id: str
    tenant: str
    stats: Stats
    """As it grows."""
    began_s: float


@dataclass(slots=True)
class RunningAnswers:
    """The answers of one gateway, the oldest first."""

    answers: dict[str, RunningAnswer] = field(default_factory=dict)
    ended_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Of all answers since the gateway's start."""
        return self.ended_tokens + sum(answer.stats.tokens for answer in self.answers.values())

    @contextlib.contextmanager
    def under_way(self, tenant: str, stats: Stats) -> Iterator[None]:
        """Lists an answer until it ends."""
        id_ = secrets.token_hex(3)
        while id_ in self.answers:  # of thousands of answers two draw the same before long
            id_ = secrets.token_hex(3)
        answer = self.answers[id_] = RunningAnswer(id_, tenant, stats, time.monotonic())
        try:
            yield
        finally:
            del self.answers[answer.id]
            self.ended_tokens += stats.tokens
