"""Whose fault it is: tables of how far a session has come on three stages, half a second apart."""

from __future__ import annotations

import pytest

from bsns.client.fault import Progress
from bsns.core.errors import BsnsError, PeerSlow, PeerTimedOut, UnknownSession
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import There

ROUTE = [PeerId(name) for name in "abc"]
SENT = 10
Look = tuple[tuple[int, int], ...]


def judged(*looks: Look, usual_s: float = 0.02) -> tuple[str, type[BsnsError]] | None:
    progress, found = Progress(), None
    for number, look in enumerate(looks):
        there = {peer: There(SessionId(1), *far) for peer, far in zip(ROUTE, look, strict=True)}
        found = progress.fault(SENT, ROUTE, there, usual_s, 0.5 * number)
    return found and (found[0], type(found[1]))


ALL = (10, 10)


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([(ALL, ALL, ALL)], None),
        ([(ALL, ALL, ALL)] * 2, ("c", PeerTimedOut)),  # it was computed, and nothing comes
        ([((9, 9), (9, 9), (9, 9))] * 2, ("a", PeerTimedOut)),
        ([(ALL, (9, 9), (9, 9))], None),
        ([(ALL, (9, 9), (9, 9))] * 2, ("b", PeerTimedOut)),
        ([(ALL, ALL, (9, 9))] * 2, ("c", PeerTimedOut)),
        ([(ALL, (10, 9), (9, 9))] * 2, None),  # it computes: not yet for long
        ([(ALL, (10, 9), (9, 9))] * 3, ("b", PeerSlow)),
        ([(ALL, (10, 4), (4, 4)), (ALL, (10, 5), (5, 5)), (ALL, (10, 6), (6, 6))], None),  # a prompt that goes on
        ([(ALL, (-1, -1), (9, 9))], ("b", UnknownSession)),
        ([(ALL, (9, 9), (9, 9)), (ALL, ALL, (10, 9))], None),
    ],
)
def test_the_first_stage_at_fault(looks: list[Look], expected: tuple[str, type[BsnsError]] | None) -> None:
    assert judged(*looks) == expected


def test_slow_is_ten_usual_turns_and_longer_where_nothing_is_usual() -> None:
    slow = (ALL, (10, 9), (9, 9))
    assert judged(*[slow] * 5, usual_s=0.3) is None
    assert judged(*[slow] * 8, usual_s=0.3) == ("b", PeerSlow)
    assert judged(*[slow] * 16, usual_s=0.0) is None
    assert judged(*[slow] * 18, usual_s=0.0) == ("b", PeerSlow)
