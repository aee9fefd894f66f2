"""Asks: how likely is a continuation after a context? As text or as tokens; and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Encode = Callable[[str], list[int]]
"""Text to tokens, with what the tokenizer puts before it (for example a beginning-of-text token)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A continuation of a context, both as text. A space between them belongs to the continuation."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """The same, in a model's own tokens. Neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What a model has to read: the last token of the continuation is only predicted."""
        return (self.context + self.continuation)[:-1]


Ask = Text | Tokens


@dataclass(frozen=True, slots=True)
class Score:
    """A continuation's summed log-probability, in nats, and which token was the likeliest at each of its places."""

    logprob: float
    likeliest: tuple[int, ...]
    greedy: bool
    """Whether the continuation is made of the likeliest tokens alone."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores in the order of the asks; `tokens` were scored, `read_tokens` went through the model for it."""

    scores: tuple[Score, ...]
    tokens: int
    read_tokens: int


class Scorer(Protocol):
    """Answers asks; may be called many times at once.

    score: asks that belong together, for instance the endings of one context → their scores, in their order. Raises
    BsnsError for what could not be computed; then nothing of these asks is kept.
    """

    async def score(self, asks: Sequence[Ask]) -> Scored: ...


def in_tokens(ask: Text, encode: Encode, prefix: int | None, most: int) -> Tokens:
    """A text ask in tokens, as lm-evaluation-harness cuts them: context and continuation are encoded together, and the
    continuation is what the context alone does not give. An empty context is the `prefix` token. At most `most` tokens
    are read: the context loses its front.
    """
    # spaces at the context's end are part of the word that follows, in most tokenizers
    bare = ask.context.rstrip()
    whole = encode(ask.context + ask.continuation)
    cut = min(len(encode(bare)), len(whole) - 1) if bare else 0
    if cut < 1:
        if prefix is not None and whole[:1] != [prefix]:
            whole = [prefix, *whole]
        cut = 1
    context, continuation = whole[:cut], whole[cut:]
    left = max(1, most + 1 - len(continuation))
    return Tokens(tuple(context[-left:]), tuple(continuation))


def covered(reads: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each text that is to be read another that begins with it: whoever reads that has read both."""
    covers: dict[tuple[int, ...], tuple[int, ...]] = {}
    following: tuple[int, ...] = ()
    # in this order a text comes right before those that begin with it
    for read in sorted(set(reads), reverse=True):
        begins = following[: len(read)] == read
        covers[read] = following = following if begins else read
    return covers


def windows(tokens: Sequence[int], prefix: int | None, most: int) -> list[Tokens]:
    """A whole text as asks in which every token is predicted once; at most `most` tokens are read in each, and where
    there is text before them it is read along. The text's first token follows `prefix`, or is not predicted.
    """
    if prefix is not None and list(tokens[:1]) != [prefix]:
        tokens = [prefix, *tokens]
    ends = [*range(1 + most, len(tokens), most), len(tokens)]
    starts = [1, *ends[:-1]]
    cuts = [(max(0, end - 1 - most), start, end) for start, end in zip(starts, ends, strict=True) if start < end]
    return [Tokens(tuple(tokens[first:start]), tuple(tokens[start:end])) for first, start, end in cuts]
