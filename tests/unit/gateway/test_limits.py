"""Limits by tables: how often, and how much at once."""

from __future__ import annotations

import pytest

from bsns.gateway.limits import Allowance, Limits


def test_a_minutes_worth_at_once_and_then_evenly() -> None:
    limits, allowance = Limits(), Allowance(requests_per_minute=6)
    assert [limits.ask("ann", allowance, 100.0) for _ in range(6)] == [0.0] * 6
    assert limits.ask("ann", allowance, 100.0) == pytest.approx(10)
    assert limits.ask("ann", allowance, 104.0) == pytest.approx(6)
    assert limits.ask("bob", allowance, 104.0) == 0.0
    assert limits.ask("ann", allowance, 110.0) == 0.0
    assert limits.ask("ann", allowance, 110.0) == pytest.approx(10)
    assert [limits.ask("ann", allowance, 1e6) for _ in range(7)] == [0.0] * 6 + [pytest.approx(10)]


def test_no_limit() -> None:
    limits = Limits()
    assert {limits.ask("ann", Allowance(), 0.0) for _ in range(1000)} == {0.0}
    assert all(limits.begin("ann", Allowance(), 16) for _ in range(100))


def test_answers_under_way() -> None:
    limits, allowance = Limits(), Allowance(answers=3)
    assert limits.begin("ann", allowance, 2)
    assert not limits.begin("ann", allowance, 2)
    assert limits.begin("ann", allowance, 1)
    assert limits.begin("bob", allowance, 3)
    limits.end("ann", 2)
    assert limits.begin("ann", allowance, 2)
    assert not limits.begin("ann", allowance, 1)


def test_answers_before_the_first_question_leave_it_its_minute() -> None:
    limits, allowance = Limits(), Allowance(requests_per_minute=2, answers=1)
    limits.begin("ann", allowance, 1)
    assert [limits.ask("ann", allowance, 5.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(30)]
