"""Parked sessions: they keep what they hold as long as nobody else needs the room."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, BsnsError, CacheFull, NotHere, UnknownSession
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.codecs import RAW
from bsns.protocol.inference import Open, Part, Resize
from bsns.worker import sessions as sessions_module
from bsns.worker.sessions import SessionTable

CLIENT, STRANGER = PeerId("client"), PeerId("stranger")
HELD = BlockRange(0, 4)


class Table(SessionTable):
    """Of 100 tokens, 60 for a session at most; notes who was evicted."""

    def __init__(self) -> None:
        super().__init__(
            model=ModelId("m"), held=HELD, dtype="float32", cache_tokens=100, context_tokens=60, max_sessions=4
        )
        self.gone: list[int] = []
        self.evicted = self.gone.append

    def begin(self, session: int, tokens: int = 20, client: PeerId = CLIENT) -> None:
        self.open(Open(SessionId(session), ModelId("m"), 0, 4, "float32", tokens, 1, None), client, 0.0)

    def park(self, session: int, tokens: int = 10, client: PeerId = CLIENT, now_s: float = 0.0) -> None:
        self.change(Resize(SessionId(session), tokens, tokens, parked=True), client, now_s)

    def resume(self, session: int, tokens: int = 20, client: PeerId = CLIENT) -> None:
        self.change(Resize(SessionId(session), tokens, max(0, min(tokens, 12))), client, 0.0)

    def give(self, session: int, position: int, rows: int) -> None:
        self.step(Part(SessionId(session), position, rows, 0), RAW, CLIENT, 0.0)


@pytest.fixture
def table() -> Table:
    return Table()


def test_a_parked_session_takes_no_room_and_no_steps(table: Table) -> None:
    table.begin(1)
    table.give(1, 0, 15)
    table.park(1, 12)
    table.check()
    assert (len(table), table.cache_tokens_left, table.reserved) == (0, 100, 0)
    held = table.get(SessionId(1))
    assert held is not None
    assert (held.end, held.max_tokens) == (12, 12), "what lies beyond is forgotten"
    with pytest.raises(UnknownSession):
        table.give(1, 12, 1)
    table.resume(1, 30)
    table.give(1, 12, 18)
    assert (len(table), table.cache_tokens_left) == (1, 70)
    table.check()


def test_the_oldest_make_room_and_running_ones_never_do(table: Table) -> None:
    for session in (1, 2, 3):
        table.begin(session, 30)
        table.park(session, 30)
    table.begin(4, 30)
    assert table.gone == [1]
    table.begin(5, 60)
    assert table.gone == [1, 2, 3]
    with pytest.raises(CacheFull):
        table.begin(6, 20)
    assert len(table) == 2
    table.check()


def test_who_was_used_last_goes_last(table: Table) -> None:
    for session in (1, 2):
        table.begin(session, 30)
        table.park(session, 30)
    table.resume(1, 30)
    table.park(1, 30)
    table.begin(3, 60)
    assert table.gone == [2]


def test_without_room_nothing_changes(table: Table) -> None:
    table.begin(1, 30)
    table.park(1, 5)
    table.begin(2, 60)
    with pytest.raises(CacheFull, match="50 tokens of cache asked for, 40 of 100 left"):
        table.resume(1, 50)
    table.check()


def test_a_session_grows_to_what_its_caches_hold(table: Table) -> None:
    table.begin(1, 10)
    table.resume(1, 20)
    with pytest.raises(CacheFull, match="21 tokens asked for, of 20 that the session can hold"):
        table.resume(1, 21)
    assert table.reserved == 20


@pytest.mark.parametrize("tokens", [0, -1, 61, 2**62])
def test_impossible_sizes(table: Table, tokens: int) -> None:
    table.begin(1)
    for parked in (False, True):
        with pytest.raises(BadFrame):
            table.change(Resize(SessionId(1), tokens, tokens, parked), CLIENT, 0.0)
    table.check()


def test_parking_is_no_way_to_more(table: Table) -> None:
    table.begin(1, 10)
    with pytest.raises(BadFrame, match="cannot be parked with 11"):
        table.park(1, 11)


def test_others_sessions_look_unknown(table: Table) -> None:
    table.begin(1)
    for act in (table.park, table.resume):
        with pytest.raises(UnknownSession):
            act(1, 10, client=STRANGER)
        with pytest.raises(UnknownSession):
            act(2, 10)
    assert table.reserved == 20


def test_a_range_that_drains_keeps_none(table: Table) -> None:
    table.begin(1)
    table.begin(2)
    table.park(1)
    table.drain(HELD)
    assert table.gone == [1]
    table.park(2)
    with pytest.raises(NotHere):
        table.resume(2)
    assert table.running_on(HELD) == 1


def test_they_end_with_their_client_and_when_nobody_comes(table: Table) -> None:
    table.begin(1)
    table.park(1)
    assert table.close_all_of(CLIENT) == [1]
    table.begin(2)
    table.park(2, now_s=5.0)
    assert table.expire(604.0) == []
    assert table.expire(606.0) == [2]
    table.check()


def test_a_smaller_promise_evicts(table: Table) -> None:
    table.begin(1, 60)
    table.park(1, 60)
    table.resize(50)
    assert table.gone == [1]


def test_there_are_not_too_many(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "MAX_PARKED", 3)
    for session in range(8):
        table.begin(session, 1)
        table.park(session, 1)
    assert table.gone == [0, 1, 2, 3, 4]
    table.check()


class Parking(RuleBasedStateMachine):
    """Whatever happens, the books are right, and whoever runs goes on."""

    ids, sizes = st.integers(0, 7), st.integers(-1, 62)
    peers = st.sampled_from([CLIENT, STRANGER])

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.running: dict[int, int] = {}

    def attempt(self, act: object, session: int, tokens: int, client: PeerId) -> bool:
        before = {s.id: (s.max_tokens, s.parked) for s in self.table.all()}
        try:
            act(session, tokens, client)  # type: ignore[operator]
        except BsnsError:
            assert {s.id: (s.max_tokens, s.parked) for s in self.table.all()} == before
            return False
        return True

    @rule(session=ids, tokens=sizes, client=peers)
    def begin(self, session: int, tokens: int, client: PeerId) -> None:
        if self.attempt(self.table.begin, session, tokens, client):
            self.running[session] = tokens

    @rule(session=ids, tokens=sizes, client=peers)
    def park(self, session: int, tokens: int, client: PeerId) -> None:
        if self.attempt(self.table.park, session, tokens, client):
            self.running.pop(session, None)

    @rule(session=ids, tokens=sizes, client=peers)
    def resume(self, session: int, tokens: int, client: PeerId) -> None:
        if self.attempt(self.table.resume, session, tokens, client):
            self.running[session] = tokens

    @rule(session=ids, client=peers)
    def close(self, session: int, client: PeerId) -> None:
        if self.table.close(SessionId(session), client):
            self.running.pop(session, None)

    @invariant()
    def in_order(self) -> None:
        self.table.check()
        assert {s.id: s.max_tokens for s in self.table.all() if not s.parked} == self.running


TestParking = Parking.TestCase
TestParking.settings = settings(max_examples=40, stateful_step_count=30)
