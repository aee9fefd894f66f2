"""Scoring over a swarm: log-probabilities of continuations, taken from the logits chunk by chunk."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import structlog
import torch

from bsns.core.errors import BadOption, BsnsError, PeerFailed, UserError
from bsns.evaluation.asks import Ask, Encode, Score, Scored, Text, Tokens, covered, in_tokens

T = TypeVar("T")
log = structlog.get_logger(__name__)

AT_ONCE = 8
"""Sessions at a time: enough to keep a few stages busy, few enough that their caches fit a small swarm."""
TRIES = 3
AGAIN_S = 2.0
"""How long a text that failed waits before it is read again: a swarm needs about so long to notice a lost node."""


async def again(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` gives, begun again where the swarm could not finish it: by then it may have found other nodes."""
    for _ in range(TRIES - 1):
        try:
            return await work()
        except UserError:
            raise
        except BsnsError as error:
            log.info("a text is read again", error=error.message)
        await asyncio.sleep(AGAIN_S)
    return await work()


class Reads(Protocol):
    """What a swarm's client gives (client.generate.Generator): logits (rows, vocabulary), chunk by chunk, one row for
    each of a text's tokens from `start` on; as many at a time as `context_tokens` holds."""

    context_tokens: int

    def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]: ...


class SwarmScorer:
    """A Scorer over a swarm."""

    def __init__(self, reads: Reads, encode: Encode, *, prefix: int | None = None) -> None:
        """`prefix`: the token that stands for an empty context."""
        self._reads = reads
        self._encode = encode
        self._prefix = prefix

    async def score(self, asks: Sequence[Ask]) -> Scored:
        """See Scorer. Asks that begin alike are read once where the one is the beginning of the other: choices of one
        token each cost no more than their context."""
        tokens = [self._tokens(ask) for ask in asks]
        covers = covered([ask.read for ask in tokens])
        gathering = {ask: _Gathering(ask) for ask in tokens}
        for text in set(covers.values()):
            members = [found for ask, found in gathering.items() if covers[ask.read] == text]
            await again(functools.partial(self._read, text, members))
        return Scored(
            scores=tuple(gathering[ask].score() for ask in tokens),
            tokens=sum(len(ask.continuation) for ask in tokens),
            read_tokens=sum(map(len, set(covers.values()))),
        )

    def _tokens(self, ask: Ask) -> Tokens:
        match ask:
            case Tokens():
                found = ask
            case Text():
                found = in_tokens(ask, self._encode, self._prefix, self._reads.context_tokens)
        if not found.context or not found.continuation:
            raise BadOption("there is nothing to score: a context and a continuation have a token each, at least")
        return found

    async def _read(self, text: tuple[int, ...], members: Sequence[_Gathering]) -> None:
        for member in members:
            member.clear()
        start = min(member.first for member in members)
        chunks = self._reads.logits(text, start)
        try:
            async for logits_RV in chunks:
                for member in members:
                    member.take(start, logits_RV)
                start += len(logits_RV)
        finally:
            if isinstance(chunks, AsyncGenerator):  # so that its session ends now, whatever happened
                await chunks.aclose()


class _Gathering:
    """What the chunks that have come so far say about one continuation."""

    def __init__(self, ask: Tokens) -> None:
        self._targets = torch.tensor(ask.continuation)
        self.first = len(ask.context) - 1
        """The row that predicts the first target."""
        self.clear()

    def clear(self) -> None:
        self._logprob = 0.0
        self._likeliest: list[int] = []

    def take(self, start: int, logits_RV: torch.Tensor) -> None:
        """The logits of the rows from `start` on. Raises PeerFailed for those that are no numbers."""
        first = max(self.first, start)
        end = min(self.first + len(self._targets), start + len(logits_RV))
        if first >= end:
            return
        targets_N = self._targets[first - self.first : end - self.first]
        rows_NV = logits_RV[first - start : end - start].float()
        logprobs_N = rows_NV.gather(1, targets_N[:, None])[:, 0] - rows_NV.logsumexp(1)
        logprob = float(logprobs_N.double().sum())
        if not math.isfinite(logprob):
            raise PeerFailed("the swarm's logits are not numbers; a node computes nonsense")
        self._logprob += logprob
        self._likeliest += rows_NV.argmax(1).tolist()

    def score(self) -> Score:
        likeliest = tuple(self._likeliest)
        return Score(self._logprob, likeliest, greedy=likeliest == tuple(self._targets.tolist()))
