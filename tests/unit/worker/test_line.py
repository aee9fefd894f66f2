"""Who waits for room gets it in turn."""

from __future__ import annotations

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import CacheFull, CacheTooSmall
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.inference import Open, Part
from bsns.worker.line import MOST_WAITING, WAITS_S, Line
from bsns.worker.sessions import SessionTable

A, B, C = map(PeerId, "abc")


def table(cache_tokens: int = 20, max_sessions: int = 9) -> SessionTable:
    return SessionTable(
        model=ModelId("m"),
        held=BlockRange(0, 4),
        dtype="float32",
        cache_tokens=cache_tokens,
        context_tokens=40,
        max_sessions=max_sessions,
    )


class Asker:
    """Clients that ask a table for room."""

    def __init__(self, sessions: SessionTable) -> None:
        self.sessions = sessions
        self.number = 0

    def open(self, client: PeerId, now_s: float, *, tokens: int = 10, waits: bool = True) -> SessionId:
        self.number += 1
        message = Open(SessionId(self.number), ModelId("m"), 0, 4, "float32", tokens, 1, None, waits=waits)
        return self.sessions.open(message, client, now_s).id

    def refused(self, client: PeerId, now_s: float, *, tokens: int = 10, waits: bool = True) -> str:
        before = self.sessions.reserved, len(self.sessions)
        with pytest.raises(CacheFull) as caught:
            self.open(client, now_s, tokens=tokens, waits=waits)
        assert (self.sessions.reserved, len(self.sessions)) == before
        self.sessions.check()
        return caught.value.message


def full() -> tuple[Asker, SessionId]:
    """Of a table whose room A has; closing this session of its two leaves room for one."""
    asker = Asker(table())
    first = asker.open(A, 0.0)
    asker.open(A, 0.0)
    return asker, first


def test_who_was_refused_first_gets_room_first() -> None:
    asker = Asker(table())
    mine = [asker.open(A, 0.0), asker.open(A, 0.0)]
    asker.refused(B, 0.0)
    asker.refused(C, 0.1)
    assert asker.sessions.close(mine[0], A)
    assert "beside 1 sessions and 1 that wait" in asker.refused(C, 0.2)
    asker.refused(A, 0.2)
    asker.open(B, 0.3)
    assert asker.sessions.close(mine[1], A)
    asker.refused(B, 0.4)  # for more it comes after those that have had none
    asker.refused(A, 0.4)
    asker.open(C, 0.4)


def test_who_gives_back_what_it_had_no_use_for_keeps_its_place() -> None:
    """Another stage had no room for it."""
    asker, first = full()
    asker.refused(B, 0.0)
    asker.refused(C, 0.1)
    assert asker.sessions.close(first, A)
    mine = asker.open(B, 0.2)
    assert asker.sessions.close(mine, B)
    asker.refused(C, 0.3)
    mine = asker.open(B, 0.4)
    asker.sessions.step(Part(mine, 0, 1, 1), "raw", B, 0.5)
    assert asker.sessions.close(mine, B)
    asker.refused(B, 0.6)
    asker.open(C, 0.6)


def test_who_does_not_stand_in_line_does_not_get_ahead_of_it_either() -> None:
    asker, first = full()
    asker.refused(B, 0.0, waits=False)
    asker.refused(C, 0.1)
    assert asker.sessions.close(first, A)
    asker.refused(B, 0.2, waits=False)
    asker.open(C, 0.3)


def test_who_asks_no_more_waits_no_more() -> None:
    asker, first = full()
    asker.refused(B, 0.0)
    assert asker.sessions.close(first, A)
    asker.refused(C, WAITS_S)
    asker.open(C, WAITS_S + 0.1)


def test_who_gives_up_its_place_waits_no_more() -> None:
    asker, first = full()
    asker.refused(B, 0.0)
    place = SessionId(asker.number)
    assert asker.sessions.close(first, A)
    asker.refused(C, 0.1)
    assert not asker.sessions.close(place, C), "nobody gives up another's"
    asker.refused(C, 0.1)
    assert not asker.sessions.close(place, B)
    asker.open(C, 0.1)


def test_who_has_asked_again_since_waits_on() -> None:
    asker, first = full()
    asker.refused(B, 0.0)
    place = SessionId(asker.number)
    asker.refused(B, 0.1)
    assert not asker.sessions.close(place, B)
    assert asker.sessions.close(first, A)
    asker.refused(C, 0.2)
    mine = asker.open(B, 0.2)
    assert asker.sessions.close(mine, B)  # had no use for it, and comes where it was
    asker.refused(C, 0.3)
    assert not asker.sessions.close(mine, B)
    asker.open(C, 0.3)


def test_who_is_gone_waits_no_more() -> None:
    asker, first = full()
    asker.refused(B, 0.0)
    asker.sessions.close_all_of(B)
    assert asker.sessions.close(first, A)
    asker.open(C, 0.1)


def test_there_is_room_for_others_beside_what_the_first_wants() -> None:
    asker = Asker(table(cache_tokens=40))
    held = [asker.open(A, 0.0) for _ in range(4)]
    asker.refused(B, 0.0)
    for session in held[:2]:
        assert asker.sessions.close(session, A)
    asker.open(C, 0.1)
    asker.open(B, 0.1)


def test_one_that_wants_much_is_not_overtaken_for_ever() -> None:
    asker = Asker(table())
    held = [asker.open(A, 0.0), asker.open(A, 0.0)]
    asker.refused(B, 0.0, tokens=20)
    assert asker.sessions.close(held[0], A)
    asker.refused(C, 0.1)
    asker.refused(B, 0.1, tokens=20)
    assert asker.sessions.close(held[1], A)
    asker.open(B, 0.2, tokens=20)


def test_sessions_that_others_wait_for_count_too() -> None:
    asker = Asker(table(cache_tokens=100, max_sessions=1))
    first = asker.open(A, 0.0)
    asker.refused(B, 0.0)
    assert asker.sessions.close(first, A)
    asker.refused(A, 0.1)
    asker.open(B, 0.1)


def test_what_never_fits_does_not_hold_up_others() -> None:
    asker = Asker(table())
    with pytest.raises(CacheTooSmall, match="21 tokens of cache asked for, 20 of 20 left; ask for fewer"):
        asker.open(A, 0.0, tokens=21)
    asker.open(B, 0.0)


def test_the_line_is_bounded() -> None:
    line = Line()
    for number in range(MOST_WAITING + 5):
        line.join(PeerId(f"{number}"), SessionId(number), 1, 0.0)
    assert line.ahead_of(A, 0.0) == (MOST_WAITING, MOST_WAITING)
