"""Whose fault it is: tables of how far a session has come on three stages, half a second apart."""

from __future__ import annotations

import msgspec
import pytest

from bsns.client.fault import BUSY_S, MOVING_S, Progress
from bsns.core.errors import BsnsError, PeerSlow, PeerTimedOut, UnknownSession
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import There

ROUTE = [PeerId(name) for name in "abc"]
THROUGH, SENT = 9, 10
Look = tuple[tuple[int, int], ...]


def judged(*looks: Look, usual_s: float = 0.02) -> tuple[str, type[BsnsError]] | None:
    progress, found = Progress(), None
    for number, look in enumerate(looks):
        found = progress.fault((THROUGH, SENT), (0, 0), ROUTE, _there(look), usual_s, 0.5 * number)
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


def test_a_stage_whose_node_computes_for_others_is_busy_for_a_while() -> None:
    def judged_at(per_look: float, usual_s: float) -> float | None:
        """When the second stage is found slow, whose node computes so many batches from one look to the next."""
        progress = Progress()
        for look in range(60):
            there = _there((ALL, (10, 9), (9, 9)))
            there[ROUTE[1]] = msgspec.structs.replace(there[ROUTE[1]], batches=7 + int(per_look * look))
            if progress.fault((THROUGH, SENT), (0, 0), ROUTE, there, usual_s, 0.5 * look) is not None:
                return 0.5 * look
        return None

    assert judged_at(0.0, 0.02) == 1.0
    assert judged_at(1.0, 0.02) == BUSY_S, "each in less than a slow one's time"
    assert judged_at(0.2, 0.02) == 1.0, "one batch takes it longer than that"
    assert judged_at(1.0, 2.0) == 20.0, "what is usual takes as long"


def test_what_is_on_its_way_over_a_slow_one_is_not_late() -> None:
    def judged_at(*onward: tuple[int, int]) -> tuple[PeerId, BsnsError] | None:
        """The second stage lacks a chunk that the first has sent so far."""
        progress, found = Progress(), None
        for number, bytes_ in enumerate(onward):
            there = {
                peer: There(SessionId(1), *far, onward)
                for peer, far, onward in zip(ROUTE, (ALL, (4, 4), (4, 4)), (bytes_, (0, 0), (0, 0)), strict=True)
            }
            found = progress.fault((THROUGH, SENT), (0, 0), ROUTE, there, 0.02, 0.5 * number)
        return found

    assert judged_at((900, 100), (900, 200), (900, 300)) is None
    assert judged_at((900, 100), (1200, 100)) is not None, "it is only given more to send"
    assert judged_at((900, 100), (900, 900), (900, 900)) is not None, "everything has arrived, says the host"


def test_a_prompt_on_its_way_to_the_first_stage_is_not_late_for_a_while() -> None:
    far = {peer: There(SessionId(1), 4, 4) for peer in ROUTE}
    progress = Progress()
    assert progress.fault((THROUGH, SENT), (900, 100), ROUTE, far, 0.02, 0.0) is None
    assert progress.fault((THROUGH, SENT), (900, 200), ROUTE, far, 0.02, 0.5) is None
    assert progress.fault((THROUGH, SENT), (900, 200), ROUTE, far, 0.02, 1.0) is not None
    progress = Progress()
    looks = [progress.fault((THROUGH, SENT), (900, 100 + look), ROUTE, far, 0.02, look) for look in range(20)]
    assert looks[: int(MOVING_S)] == [None] * int(MOVING_S), "it leaves"
    assert looks[-1] is not None, "it only seems to"


def test_who_has_waited_for_the_one_before_has_a_moment_to_get_the_step() -> None:
    progress = Progress()
    looks = [(ALL, (10, 9), (9, 9)), (ALL, ALL, (9, 9)), (ALL, ALL, (9, 9))]
    found = [
        progress.fault((THROUGH, SENT), (0, 0), ROUTE, _there(look), 1.0, 0.5 * number)
        for number, look in enumerate(looks)
    ]
    assert found[:2] == [None, None]
    assert found[2] is not None


def test_after_a_repair_progress_is_seen_anew() -> None:
    """What a stage was sent by the former one before it is no measure of what the new one sends."""
    progress = Progress()
    before = {
        peer: There(SessionId(1), *far, (9000, 9000)) for peer, far in zip(ROUTE, (ALL, ALL, (9, 9)), strict=True)
    }
    progress.fault((THROUGH, SENT), (0, 0), ROUTE, before, 0.02, 0.0)
    progress.clear()
    for look, taken in enumerate((100, 200, 300)):
        there = {
            peer: There(SessionId(1), *far, onward)
            for peer, far, onward in zip(ROUTE, (ALL, ALL, (9, 9)), ((0, 0), (900, taken), (0, 0)), strict=True)
        }
        assert progress.fault((THROUGH, SENT), (0, 0), ROUTE, there, 0.02, 0.5 + 0.5 * look) is None


def _there(look: Look) -> dict[PeerId, There]:
    return {peer: There(SessionId(1), *far) for peer, far in zip(ROUTE, look, strict=True)}


STALE = (14, 14)
"""What a stage has of guesses that were wrong, which is more than there is now."""


@pytest.mark.parametrize(
    ("look", "expected"),
    [
        ((STALE, STALE, STALE), "a"),
        ((ALL, STALE, STALE), "b"),
        ((ALL, ALL, STALE), "c"),
        ((ALL, ALL, (10, 14)), "c"),
    ],
)
def test_wrong_guesses_are_no_progress(look: Look, expected: str) -> None:
    """Who holds more than was sent has not heard of the step that came after: whoever lacks it first is to blame."""
    found = judged(look, look, look, look)
    assert found is not None
    assert found[0] == expected
