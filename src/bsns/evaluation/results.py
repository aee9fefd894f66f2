"""Results of a run: what was run, what came out of each task, and of each item. As a JSON file and back."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bsns.core.errors import BadOption
from bsns.evaluation.tasks.task import Kind

SCORING = 1
"""Raise it when the same answers would be judged in another way: items kept before are then asked again."""


class Settings(msgspec.Struct, frozen=True):
    """What an item's answer depends on. `model_id` names the weights; `executor`, `dtype` and `quant` are the nodes',
    `wire` is what activations travel in."""

    model: str
    model_id: str
    dtype: str
    executor: str
    quant: str
    wire: str
    scoring: int = SCORING

    def digest(self) -> str:
        """The same for the same settings, in other runs too."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


class ItemResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one item: values and choices by metric (tasks.task.Verdict), its asks' log-probabilities in nats or the text
    that it got, and what it took: tokens scored (or made), tokens read, and seconds since the item before was done."""

    item: str
    values: dict[str, float]
    choices: dict[str, tuple[int, ...]]
    logprobs: tuple[float, ...]
    tokens: int
    read_tokens: int
    seconds: float
    text: str = ""


class Metric(msgspec.Struct, frozen=True):
    """A figure over all items, with its standard error; None where one item alone gives none."""

    kind: Kind
    value: float
    stderr: float | None


class TaskResult(msgspec.Struct, frozen=True):
    """Of one task. Of perplexities the items' values are in nats; accuracies are shares of 1."""

    n: int
    metrics: dict[str, Metric]
    seconds: float
    tokens: int
    read_tokens: int
    items: tuple[ItemResult, ...] = ()


class Results(msgspec.Struct, frozen=True):
    """Of one run. `nodes`: how many computed it, when it began."""

    bsns: str
    settings: Settings
    nodes: int
    tasks: dict[str, TaskResult]

    def to_json(self) -> bytes:
        """All of it, for a file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Results:
        """Raises BadOption, naming the file, for anything but what `to_json` made."""
        try:
            return msgspec.json.decode(content, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadOption(f"{name} is no result of bsns eval: {error}") from None

    def summary(self) -> dict[str, Any]:
        """As much as a person wants to read: everything but the items."""
        whole: dict[str, Any] = msgspec.to_builtins(self)
        for task in whole["tasks"].values():
            del task["items"]
        return whole


def task_result(kinds: Mapping[str, Kind], items: Sequence[ItemResult]) -> TaskResult:
    """The figures over a task's items; at least one."""
    return TaskResult(
        n=len(items),
        metrics={name: metric(kind, [item.values[name] for item in items]) for name, kind in kinds.items()},
        seconds=round(math.fsum(item.seconds for item in items), 3),
        tokens=sum(item.tokens for item in items),
        read_tokens=sum(item.read_tokens for item in items),
        items=tuple(items),
    )


def metric(kind: Kind, values: Sequence[float]) -> Metric:
    """The figure and its standard error. An accuracy's is √(p(1−p)/(n−1)), which is that of a mean of zeros and ones;
    a perplexity's is that of the mean in nats, times the perplexity (the delta method)."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    if kind != "perplexity":
        return Metric(kind, mean, error)
    value = math.exp(min(mean, 700.0))  # beyond it no number can be written down
    return Metric(kind, value, None if error is None else value * error)
