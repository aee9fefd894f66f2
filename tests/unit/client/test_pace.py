"""The pace of an answer: what is usual stays usual, and whose computing has become slow is found."""

from __future__ import annotations

import pytest

from bsns.client.pace import LATEST, MOST_SLOW, WINDOW, Pace
from bsns.protocol.inference import Passed

QUICK = [20.0, 25.0, 15.0]


def after(turns: int, quick: list[float] = QUICK) -> Pace:
    pace = Pace()
    for _ in range(turns):
        assert pace.turned(sum(quick) + 5, quick) is None
    return pace


def test_what_is_usual_is_known_after_a_turn_and_does_not_rise() -> None:
    assert Pace().usual_s == 0
    pace = after(1)
    assert pace.usual_s == pytest.approx(0.065)
    pace = after(WINDOW)
    for _ in range(50):
        pace.turned(2000.0, [20.0, 25.0, 15.0])
    assert pace.usual_s == pytest.approx(0.065)


def test_a_stage_that_becomes_slow_is_found_after_a_few_turns() -> None:
    pace = after(WINDOW)
    found = [pace.turned(1300.0, [20.0, 1250.0, 15.0]) for _ in range(LATEST)]
    assert found == [None] * (LATEST - 1) + [1]


@pytest.mark.parametrize(
    "slow",
    [
        [20.0, 240.0, 15.0],  # ten times slower, but quick enough
        [20.0, 249.0, 149.0],
    ],
)
def test_a_stage_that_is_quick_enough_is_left_alone(slow: list[float]) -> None:
    pace = after(WINDOW)
    assert [pace.turned(sum(slow), slow) for _ in range(20)] == [None] * 20


def test_one_slow_turn_is_no_straggler() -> None:
    pace = after(WINDOW)
    for _ in range(10):
        assert pace.turned(1300.0, [20.0, 1250.0, 15.0]) is None
        assert pace.turned(65.0, QUICK) is None


def test_a_stage_that_was_always_slow_is_left_alone() -> None:
    after(60, [20.0, 1250.0, 15.0])


def test_other_stages_are_learnt_anew() -> None:
    pace = after(WINDOW)
    pace.rerouted(())
    for _ in range(WINDOW - 1):
        assert pace.turned(1300.0, [20.0, 1250.0, 15.0]) is None
    assert pace.turned(90.0, [*QUICK, 20.0]) is None


def test_a_stage_that_was_slow_from_the_beginning_is_found_by_what_its_node_says() -> None:
    pace = Pace([20.0, 0.0, 15.0])
    slow = [1250.0, 1250.0, 15.0]  # of the second nobody knows how quick it should be
    assert [pace.turned(2520.0, slow) for _ in range(LATEST)] == [None] * (LATEST - 1) + [0]
    pace.rerouted(())  # it was kept
    assert [pace.turned(2520.0, slow) for _ in range(20)] == [None] * 20


def test_a_turn_takes_no_longer_than_the_nodes_say_though_it_always_did() -> None:
    pace = Pace([20.0, 15.0])
    assert (pace.usual_s, pace.said_s) == (0.0, pytest.approx(0.035))
    pace.turned(1300.0, [640.0, 640.0])
    assert pace.usual_s == pytest.approx(0.055), "with the ways"
    pace = Pace([20.0, 15.0])
    pace.turned(1600.0, [20.0, 15.0])
    assert pace.usual_s == pytest.approx(1.6), "ways of which no node says anything"
    assert Pace([20.0, 0.0]).said_s == 0.0


def test_where_all_are_slower_than_they_say_that_is_believed_no_more() -> None:
    """On a machine that does too much at once one stage after the other would be replaced by its like."""
    says, slow = [20.0, 15.0], [640.0, 640.0]
    pace = Pace(says)
    for _ in range(MOST_SLOW):
        assert [pace.turned(1300.0, slow) for _ in range(LATEST)][-1] == 1
        pace.rerouted(says, slow=True)
    assert [pace.turned(1300.0, slow) for _ in range(20)] == [None] * 20
    assert pace.said_s == 0.0


def test_what_a_row_would_have_taken_alone_whatever_a_node_says_of_its_batch() -> None:
    assert Passed(9.0, 8.0, 1).alone_ms == 8.0
    assert Passed(9.0, 8.0, 5).alone_ms == 4.0
    assert all(Passed(9.0, 8.0, rows).alone_ms == 8.0 for rows in (0, -3, -(10**12)))
