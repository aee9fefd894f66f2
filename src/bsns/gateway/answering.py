"""The answers to one request, as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from anyio import CancelScope

from bsns.client.pieces import Piece, Stats
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.gateway.engine import Engine
from bsns.gateway.metrics import Metrics
from bsns.gateway.running import RunningAnswers


@dataclass(frozen=True, slots=True)
class Ask:
    """One choice: what the model reads, and how its answer is drawn."""

    tokens: list[int]
    options: SamplingOptions
    constraint: Constraint | None = None

    def choice(self, number: int, constraint: Constraint | None) -> Ask:
        """The same prompt's next choice, drawn with a seed of its own."""
        seed = self.options.seed + number
        return Ask(self.tokens, replace(self.options, seed=seed), constraint)


@dataclass(slots=True)
class Usage:
    """What a request cost so far, in tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them those that the swarm had kept."""
    answer_tokens: int = 0


@dataclass(slots=True)
class Answers:
    """All choices of a request, side by side."""

    engine: Engine
    asks: Sequence[Ask]
    metrics: Metrics
    usage: Usage
    tenant: str
    """Whose they are."""
    sessions: list[str]
    """The ids of those that have answered, for the log."""
    running: RunningAnswers

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Each choice's next piece, by its number. A reader that waits holds them all up; closing this frees them.

        Raises what the engine does, of whichever choice fails first.
        """
        streams = [self._one(ask) for ask in self.asks]
        waiting = {asyncio.create_task(_next(stream)): i for i, stream in enumerate(streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    i = waiting.pop(task)
                    if (piece := task.result()) is not None:
                        yield i, piece
                        waiting[asyncio.create_task(_next(streams[i]))] = i
        finally:
            for task in waiting:
                task.cancel()
            with CancelScope(shield=True):  # who serves a stream cancels at every await, once its reader has gone
                await asyncio.gather(*waiting, return_exceptions=True)
                for stream in streams:
                    await stream.aclose()

    async def _one(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        metrics, usage, last_s = self.metrics, self.usage, time.monotonic()
        waited = metrics.first_token_s
        stats = Stats()
        pieces = self.engine.stream(ask.tokens, ask.options, stats, ask.constraint, self.tenant)
        try:
            with metrics.under_way.track_inprogress(), self.running.under_way(self.tenant, stats):
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        now_s = time.monotonic()
                        waited.observe(now_s - last_s)
                        if waited is metrics.first_token_s:
                            usage.cached_tokens = max(usage.cached_tokens, stats.cached_tokens)
                            metrics.cached_tokens.inc(stats.cached_tokens)
                        waited, last_s = metrics.next_token_s, now_s
                        usage.answer_tokens += 1
                        metrics.tokens.labels("out").inc()
                        yield piece
        finally:
            if stats.session:
                self.sessions.append(stats.session)


async def _next(stream: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(stream, None)
