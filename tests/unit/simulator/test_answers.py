"""What makes a simulated answer a problem."""

from __future__ import annotations

import pytest

from bsns.core.errors import PeerLost
from bsns.simulator.clients import Told


def told(**changes: object) -> Told:
    answer = Told(0, 0.0, 4, 3, False, [1.0, 2.0, 3.0], [7, 8, 9], "length", ended_s=3.0, right=True)
    for name, value in changes.items():
        setattr(answer, name, value)
    return answer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"right": None}, None),
        ({"right": False}, "wrong tokens"),
        ({"tokens": [7, 8]}, "looks complete"),
        ({"finished": None}, "looks complete"),
        ({"finished": None, "tokens": [7], "error": PeerLost.__name__}, None),
        ({"right": False, "error": PeerLost.__name__}, "wrong tokens"),
        ({"times_s": [1.0, 2.0, 27.5], "ended_s": 27.5}, "nothing was heard for 25.5 s"),
        ({"times_s": [], "tokens": [], "finished": None, "error": PeerLost.__name__, "ended_s": 26.0}, "nothing was"),
    ],
)
def test_what_must_never_be(changes: dict[str, object], said: str | None) -> None:
    problem = told(**changes).problem(20.0)
    assert (problem is None) == (said is None)
    assert said is None or said in str(problem)


def test_a_prompt_of_two_chunks_has_two_deadlines() -> None:
    assert told(prompt_tokens=200, times_s=[40.0, 41.0, 42.0], ended_s=42.0).problem(20.0) is None
    assert told(prompt_tokens=200, times_s=[46.0, 47.0, 48.0], ended_s=48.0).problem(20.0) is not None
    assert told(prompt_tokens=200, times_s=[1.0, 2.0, 28.0], ended_s=28.0).problem(20.0) is not None


def test_gaps_are_between_tokens_and_silence_is_anywhere() -> None:
    answer = told(asked_s=-9.0, times_s=[1.0, 2.0, 4.5], ended_s=5.0)
    assert (answer.gap_s, answer.silence_s) == (2.5, 10.0)
