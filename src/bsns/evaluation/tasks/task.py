"""The port of a task: its items, what is asked for each, and how the answers are judged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from bsns.evaluation.asks import Ask, Encode, Score

Kind = Literal["accuracy", "perplexity", "mean", "whole"]
"""What a metric makes of its items' values: the share that is right (1 or 0); e to the mean of nats; their mean. Or it
is one of the harness's that no mean of items gives."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: asks that belong together, and which of them is right, where one is."""

    asks: tuple[Ask, ...]
    right: int = 0
    lengths: tuple[int, ...] = ()
    """Letters of each choice, where scores are compared per letter."""

    def name(self, number: int) -> str:
        """Its place in the task, and a digest: what was made of it holds for this very question only."""
        digest = hashlib.blake2b(repr((self.asks, self.right, self.lengths)).encode(), digest_size=4)
        return f"{number}-{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one item, by metric: its value, and what was chosen (a number of a choice, or tokens)."""

    values: Mapping[str, float]
    choices: Mapping[str, tuple[int, ...]]


class Task(Protocol):
    """A task. `metrics`: by name, what becomes of the items' values.

    items: the first `limit` of them, or all; `encode` is the model's. Raises BadOption where data is missing.
    judge: the scores of an item's asks, in their order → its verdict.
    """

    metrics: Mapping[str, Kind]

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]: ...

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict: ...


def best(values: Sequence[float]) -> int:
    """The place of the greatest; of equals the first."""
    return max(range(len(values)), key=values.__getitem__)
