"""What a soak makes of what it has seen; nothing is soaked here."""

from __future__ import annotations

from typing import Any

import pytest

from bsns.bench.soak import Tally, growth, problems

FINE: dict[str, Any] = {
    "answers": 9,
    "wrong": 0,
    "truncated": 0,
    "untyped": 0,
    "freed": True,
    "rss_ratio": {"client": 1.04, "node 1": 0.9},
}


def test_growth_compares_after_the_warm_up() -> None:
    samples = [(float(at), 1000 if at < 25 else 2000 + at) for at in range(125)]
    assert growth(samples, 25.0) == (2034.5, 2114.5)
    assert growth([(1.0, 5)], 60.0) == (5, 5)  # shorter than the warm-up


def test_answers_are_right_wrong_or_cut_short() -> None:
    tally = Tally()
    tally.count([1, 2, 3], True, [1, 2, 3], exact=True)
    tally.count([1, 2, 4], True, [1, 2, 3], exact=True)
    tally.count([1, 2], True, [1, 2, 3], exact=True)
    tally.count([1, 2, 3], False, [1, 2, 3], exact=True)
    tally.count([4, 5], True, [1, 2, 3], exact=False)  # it may round differently, and end earlier
    assert (tally.answers, tally.wrong, tally.truncated) == (5, 1, 2)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"wrong": 2}, "2 wrong"),
        ({"truncated": 1}, "1 truncated"),
        ({"untyped": 1}, "1 untyped"),
        ({"answers": 0}, "no answer"),
        ({"freed": False}, "nobody freed"),
        ({"rss_ratio": {"node 3": 1.06}}, "node 3 grew"),
    ],
)
def test_what_must_not_be_is_said(change: dict[str, Any], word: str) -> None:
    assert problems(FINE) == []
    (problem,) = problems(FINE | change)
    assert word in problem
