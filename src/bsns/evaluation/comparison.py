"""Two runs side by side, item by item: what the same questions got in each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec
from scipy.stats import binomtest

from bsns.core.errors import BadOption
from bsns.evaluation.results import ItemResult, Results, Settings, TaskResult, metric

Pair = tuple[ItemResult, ItemResult]


class Accuracies(msgspec.Struct, frozen=True, tag="accuracy"):
    """Shares of 1. `difference` is b − a, its standard error that of the mean of the items' differences; `agreement`
    the share of items where both chose the same; `p` is McNemar's, exact: how likely at least so uneven a split of the
    items that only one got right would be, if neither were better."""

    a: float
    b: float
    difference: float
    stderr: float | None
    both: int
    only_a: int
    only_b: int
    neither: int
    agreement: float | None
    p: float


class Perplexities(msgspec.Struct, frozen=True, tag="perplexity"):
    """`ratio` is b / a over the same items, its standard error from the items' differences in nats."""

    a: float
    b: float
    ratio: float
    stderr: float | None


class Means(msgspec.Struct, frozen=True, tag="mean"):
    """Of metrics that are neither; `difference` is b − a, paired."""

    a: float
    b: float
    difference: float
    stderr: float | None


Compared = Accuracies | Perplexities | Means


class TaskComparison(msgspec.Struct, frozen=True):
    """`n` items are in both runs; `left_out` are in one only."""

    n: int
    left_out: int
    metrics: dict[str, Compared]


class Comparison(msgspec.Struct, frozen=True):
    """Two runs, with what each was run with."""

    a: Settings
    b: Settings
    tasks: dict[str, TaskComparison]


def compare(a: Results, b: Results) -> Comparison:
    """Every task that both have items of. Raises BadOption if there is none."""
    tasks: dict[str, TaskComparison] = {}
    for name, found in a.tasks.items():
        other = b.tasks.get(name)
        if other is not None and (pairs := _pairs(found, other)):
            tasks[name] = _task(found, other, pairs)
    if not tasks:
        raise BadOption("the two runs have no question in common; compare runs of the same tasks")
    return Comparison(a.settings, b.settings, tasks)


def _pairs(a: TaskResult, b: TaskResult) -> list[Pair]:
    others = {item.item: item for item in b.items}
    return [(item, others[item.item]) for item in a.items if item.item in others]


def _task(a: TaskResult, b: TaskResult, pairs: Sequence[Pair]) -> TaskComparison:
    metrics: dict[str, Compared] = {}
    for name in a.metrics:
        if name not in b.metrics or any(name not in item.values for pair in pairs for item in pair):
            continue
        match a.metrics[name].kind:
            case "accuracy":
                metrics[name] = _accuracies(name, pairs)
            case "perplexity":
                metrics[name] = _perplexities(name, pairs)
            case "mean":
                metrics[name] = _means(name, pairs)
            case "whole":
                continue
    return TaskComparison(len(pairs), len(a.items) + len(b.items) - 2 * len(pairs), metrics)


def _accuracies(name: str, pairs: Sequence[Pair]) -> Accuracies:
    values = _values(name, pairs)
    rights = [(a > 0.5, b > 0.5) for a, b in zip(*values, strict=True)]
    only_a, only_b = rights.count((True, False)), rights.count((False, True))
    choices = [(a.choices[name], b.choices[name]) for a, b in pairs if name in a.choices and name in b.choices]
    difference, stderr = _difference(values)
    return Accuracies(
        a=statistics.fmean(values[0]),
        b=statistics.fmean(values[1]),
        difference=difference,
        stderr=stderr,
        both=rights.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        neither=rights.count((False, False)),
        agreement=statistics.fmean(a == b for a, b in choices) if len(choices) == len(pairs) else None,
        p=float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    )


def _perplexities(name: str, pairs: Sequence[Pair]) -> Perplexities:
    values = _values(name, pairs)
    difference, stderr = _difference(values)
    ratio = math.exp(max(-700.0, min(difference, 700.0)))
    a, b = (metric("perplexity", each).value for each in values)
    return Perplexities(a, b, ratio, None if stderr is None else ratio * stderr)


def _means(name: str, pairs: Sequence[Pair]) -> Means:
    values = _values(name, pairs)
    difference, stderr = _difference(values)
    return Means(statistics.fmean(values[0]), statistics.fmean(values[1]), difference, stderr)


def _values(name: str, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    return [a.values[name] for a, _ in pairs], [b.values[name] for _, b in pairs]


def _difference(values: tuple[list[float], list[float]]) -> tuple[float, float | None]:
    """The mean of b − a over the items, and its standard error."""
    found = metric("mean", [b - a for a, b in zip(*values, strict=True)])
    return found.value, found.stderr
