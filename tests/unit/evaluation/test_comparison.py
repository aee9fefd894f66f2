"""Figures and their errors, and two runs side by side, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from bsns.core.errors import BadOption
from bsns.evaluation.comparison import Accuracies, Means, Perplexities, compare
from bsns.evaluation.results import ItemResult, Metric, Results, Settings, metric, task_result
from bsns.evaluation.tasks.task import Kind

SETTINGS = Settings("tiny", "m", "float32", "torch", "none", "none")


def results(task: str, kinds: dict[str, Kind], values: list[float], choices: list[int] | None = None) -> Results:
    (name,) = kinds
    items = [
        ItemResult(f"{number}-x", {name: value}, {name: (choices[number],)} if choices else {}, (), 1, 2, 0.5)
        for number, value in enumerate(values)
    ]
    return Results("0", SETTINGS, 3, {task: task_result(kinds, items)})


def test_figures_and_their_standard_errors() -> None:
    assert metric("accuracy", [1, 1, 0, 0, 0]) == Metric("accuracy", 0.4, pytest.approx(math.sqrt(0.4 * 0.6 / 4)))
    nats = [math.log(2), math.log(8)]
    assert metric("perplexity", nats) == Metric("perplexity", pytest.approx(4.0), pytest.approx(4.0 * math.log(2)))
    assert metric("accuracy", [1.0]) == Metric("accuracy", 1.0, None)
    assert metric("perplexity", [1e9]).value < math.inf


def test_accuracies() -> None:
    # both right 3, only A 1, only B 4, neither 2
    a = results("t", {"acc": "accuracy"}, [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    b = results("t", {"acc": "accuracy"}, [1, 1, 1, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0, 1, 2])
    found = compare(a, b).tasks["t"]
    assert (found.n, found.left_out) == (10, 0)
    got = found.metrics["acc"]
    assert isinstance(got, Accuracies)
    assert (got.a, got.b) == (0.4, 0.7)
    assert got.difference == pytest.approx(0.3)
    # differences: four of +1, one of −1, five of 0; their variance is (5 − 10 · 0.3²) / 9
    assert got.stderr == pytest.approx(math.sqrt((5 - 0.9) / 9 / 10))
    assert (got.both, got.only_a, got.only_b, got.neither) == (3, 1, 4, 2)
    assert got.agreement == pytest.approx(0.4)
    # of 5 fair coins at most 1 or at least 4 fall on one side: 2 · (1 + 5) / 32
    assert got.p == pytest.approx(12 / 32)


def test_equal_runs() -> None:
    a = results("t", {"acc": "accuracy"}, [1, 0, 1], [0, 1, 0])
    got = compare(a, a).tasks["t"].metrics["acc"]
    assert isinstance(got, Accuracies)
    assert (got.difference, got.stderr, got.agreement, got.p) == (0.0, 0.0, 1.0, 1.0)


def test_perplexities() -> None:
    a = results("p", {"perplexity": "perplexity"}, [math.log(2), math.log(8), math.log(4)])
    b = results("p", {"perplexity": "perplexity"}, [math.log(4), math.log(16), math.log(8)])
    got = compare(a, b).tasks["p"].metrics["perplexity"]
    assert isinstance(got, Perplexities)
    assert (got.a, got.b, got.ratio) == (pytest.approx(4.0), pytest.approx(8.0), pytest.approx(2.0))
    assert got.stderr == pytest.approx(0.0, abs=1e-9)  # paired: every window doubled


def test_other_means() -> None:
    a, b = (results("m", {"f1": "mean"}, values) for values in ([0.5, 0.7], [0.6, 1.0]))
    assert compare(a, b).tasks["m"].metrics["f1"] == Means(
        pytest.approx(0.6), pytest.approx(0.8), pytest.approx(0.2), pytest.approx(0.1)
    )


def test_only_questions_that_both_have_are_compared() -> None:
    a = results("t", {"acc": "accuracy"}, [1, 0, 1, 1, 1])
    b = results("t", {"acc": "accuracy"}, [1, 1])
    found = compare(a, b).tasks["t"]
    assert (found.n, found.left_out) == (2, 3)
    with pytest.raises(BadOption, match="no question in common"):
        compare(a, results("u", {"acc": "accuracy"}, [1, 1]))


def test_results_come_back_from_their_file() -> None:
    whole = results("t", {"acc": "accuracy"}, [1, 0, 1], [0, 1, 0])
    assert Results.from_json(whole.to_json(), "a.json") == whole
    assert "items" not in whole.summary()["tasks"]["t"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff", b'{"bsns": "0", "settings": {}, "tasks": {}}'])
def test_a_broken_file_is_one_line_with_its_name(text: bytes) -> None:
    with pytest.raises(BadOption, match=r"^a.json is no result of bsns eval: .+"):
        Results.from_json(text, "a.json")


def test_a_digest_holds_for_the_same_settings_only() -> None:
    others = [
        Settings("tiny", "m", "float32", "torch", quant, wire) for quant, wire in (("int8", "none"), ("none", "int8"))
    ]
    assert len({settings.digest() for settings in (SETTINGS, *others)}) == 3
    assert SETTINGS.digest() == Settings("tiny", "m", "float32", "torch", "none", "none").digest()
