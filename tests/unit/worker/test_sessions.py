"""The session table: who may step where, and how much cache is promised."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, BsnsError, CacheFull, NotHere, PositionGap, UnknownSession
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.codecs import RAW
from bsns.protocol.inference import MAX_ROWS_PER_PART, Open, Part
from bsns.worker.sessions import SessionTable

CLIENT, STRANGER, BEFORE = PeerId("client"), PeerId("stranger"), PeerId("before")
CACHE_TOKENS, CONTEXT_TOKENS, MAX_SESSIONS, IDLE_S = 100, 60, 4, 10.0
OPEN = Open(
    session=SessionId(1),
    model=ModelId("m"),
    start=2,
    end=4,
    dtype="float32",
    max_tokens=20,
    depth=3,
    next_peer=PeerId("after"),
    next_addresses=("there",),
    previous_peer=BEFORE,
)


def make_table() -> SessionTable:
    return SessionTable(
        model=ModelId("m"),
        held=BlockRange(2, 6),
        dtype="float32",
        cache_tokens=CACHE_TOKENS,
        context_tokens=CONTEXT_TOKENS,
        max_sessions=MAX_SESSIONS,
        idle_s=IDLE_S,
    )


def opening(**changes: Any) -> Open:
    return msgspec.structs.replace(OPEN, **changes)


def step(position: int, rows: int, wanted: int = 0, session: int = 1) -> Part:
    return Part(SessionId(session), position, rows, wanted)


def test_an_admitted_session_is_as_asked() -> None:
    table = make_table()
    session = table.open(OPEN, CLIENT, 5.0)
    assert (session.id, session.client, session.blocks, session.depth) == (1, CLIENT, BlockRange(2, 4), 3)
    assert (session.previous, session.next, session.next_addresses) == (BEFORE, "after", ("there",))
    assert (session.end, session.seen_s) == (0, 5.0)
    assert table.get(SessionId(1)) is session
    assert (len(table), table.cache_tokens_left) == (1, 80)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "another"}, NotHere),
        ({"start": 1}, NotHere),
        ({"end": 7}, NotHere),
        ({"start": 0, "end": 2}, NotHere),
        ({"start": 4, "end": 4}, BadFrame),
        ({"start": 5, "end": 4}, BadFrame),
        ({"start": -1}, BadFrame),
        ({"dtype": "bfloat16"}, NotHere),
        ({"max_tokens": 0}, BadFrame),
        ({"max_tokens": -5}, BadFrame),
        ({"max_tokens": CONTEXT_TOKENS + 1}, BadFrame),
        ({"max_tokens": 2**62}, BadFrame),
        ({"depth": 0}, BadFrame),
        ({"depth": 1025}, BadFrame),
        ({"at_once": 0}, BadFrame),
        ({"at_once": 4}, BadFrame),  # of three
        ({"next_peer": "x" * 257}, BadFrame),
        ({"previous_peer": "x" * 257}, BadFrame),
        ({"next_addresses": ("/ip4/192.0.2.1/tcp/1",) * 17}, BadFrame),
        ({"next_addresses": ("/" * 257,)}, BadFrame),
    ],
)
def test_refused_opens_leave_no_trace(changes: dict[str, Any], error: type[BsnsError]) -> None:
    table = make_table()
    with pytest.raises(error) as caught:
        table.open(opening(**changes), CLIENT, 0.0)
    assert type(caught.value) is error
    assert (len(table), table.cache_tokens_left) == (0, CACHE_TOKENS)
    table.check()


def test_a_session_opens_once() -> None:
    table = make_table()
    first = table.open(OPEN, CLIENT, 0.0)
    for client in (CLIENT, STRANGER):
        with pytest.raises(BadFrame):
            table.open(OPEN, client, 0.0)
    assert table.get(SessionId(1)) is first
    assert table.cache_tokens_left == 80


def test_a_full_cache_says_what_is_left_and_evicts_nobody() -> None:
    table = make_table()
    table.open(opening(max_tokens=60), CLIENT, 0.0)
    with pytest.raises(CacheFull, match="40 of 100 left"):
        table.open(opening(session=2, max_tokens=41), CLIENT, 0.0)
    table.open(opening(session=2, max_tokens=40), CLIENT, 0.0)
    assert table.cache_tokens_left == 0
    assert table.close(SessionId(1), CLIENT)
    assert table.cache_tokens_left == 60


def test_the_number_of_sessions_is_bounded() -> None:
    table = make_table()
    for session in range(MAX_SESSIONS):
        table.open(opening(session=session, max_tokens=1), CLIENT, 0.0)
    with pytest.raises(CacheFull):
        table.open(opening(session=9, max_tokens=1), CLIENT, 0.0)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (step(6, 1), PositionGap),
        (step(19, 1), PositionGap),
        (step(0, 21), BadFrame),
        (step(5, 16), BadFrame),
        (step(0, 0), BadFrame),
        (step(0, -1), BadFrame),
        (step(-1, 2), BadFrame),
        (step(0, 2, 3), BadFrame),
        (step(0, 2, -1), BadFrame),
        (step(0, MAX_ROWS_PER_PART + 1), BadFrame),
        (step(0, 1, session=2), UnknownSession),
    ],
)
def test_refused_steps_leave_no_trace(part: Part, error: type[BsnsError]) -> None:
    table = make_table()
    session = table.open(OPEN, CLIENT, 0.0)
    table.step(step(0, 5), RAW, CLIENT, 1.0)
    with pytest.raises(error) as caught:
        table.step(part, RAW, CLIENT, 2.0)
    assert type(caught.value) is error
    assert (session.end, session.seen_s) == (5, 1.0)


def test_a_step_overwrites_from_its_position_on() -> None:
    table = make_table()
    session = table.open(OPEN, CLIENT, 0.0)
    table.step(step(0, 8, 8), RAW, CLIENT, 1.0)
    table.step(step(8, 1, 1), RAW, CLIENT, 2.0)
    assert session.end == 9
    table.step(step(3, 2), RAW, CLIENT, 3.0)  # back
    assert session.end == 5
    with pytest.raises(PositionGap):
        table.step(step(6, 1), RAW, CLIENT, 4.0)  # what lay there is overwritten
    table.step(step(3, 2), RAW, CLIENT, 5.0)  # again: idempotent
    assert session.end == 5
    table.step(step(5, 15), RAW, CLIENT, 6.0)
    assert session.end == 20


def test_who_may_step() -> None:
    table = make_table()
    session = table.open(OPEN, CLIENT, 0.0)
    assert table.step(step(0, 1), RAW, BEFORE, 1.0) is session
    assert table.step(step(1, 1), RAW, CLIENT, 1.0) is session
    for other in (STRANGER, PeerId("after")):
        with pytest.raises(UnknownSession) as foreign:
            table.step(step(2, 1), RAW, other, 1.0)
        with pytest.raises(UnknownSession) as absent:
            table.step(step(2, 1, session=77), RAW, other, 1.0)
        assert foreign.value.message.replace("1", "77", 1) == absent.value.message, "a stranger learns nothing"


def test_only_its_client_closes_a_session() -> None:
    table = make_table()
    table.open(OPEN, CLIENT, 0.0)
    assert not table.close(SessionId(1), STRANGER)
    assert not table.close(SessionId(1), BEFORE)
    assert not table.close(SessionId(2), CLIENT)
    assert table.get(SessionId(1)) is not None
    assert table.close(SessionId(1), CLIENT)
    assert not table.close(SessionId(1), CLIENT)
    assert table.cache_tokens_left == CACHE_TOKENS


def test_all_of_a_client() -> None:
    table = make_table()
    for session, client in ((1, CLIENT), (2, STRANGER), (3, CLIENT)):
        table.open(opening(session=session), client, 0.0)
    assert table.close_all_of(CLIENT) == [1, 3]
    assert table.close_all_of(CLIENT) == []
    assert table.get(SessionId(2)) is not None
    assert table.cache_tokens_left == 80


def test_idle_sessions_expire() -> None:
    table = make_table()
    table.open(OPEN, CLIENT, 0.0)
    table.open(opening(session=2), CLIENT, 0.0)
    table.step(step(0, 1, session=2), RAW, CLIENT, 6.0)
    assert table.expire(IDLE_S) == []
    assert table.expire(IDLE_S + 0.1) == [1]
    assert table.expire(6.0 + IDLE_S) == []
    assert table.expire(6.1 + IDLE_S) == [2]
    assert (len(table), table.cache_tokens_left) == (0, CACHE_TOKENS)


class TableMachine(RuleBasedStateMachine):
    """Any events, against a plain model: a dictionary of client, reservation, end and time."""

    sessions = Bundle("sessions")
    peers = st.sampled_from([CLIENT, STRANGER, BEFORE])

    def __init__(self) -> None:
        super().__init__()
        self.table = make_table()
        self.model: dict[int, list[Any]] = {}
        self.now_s = 0.0

    @rule(target=sessions, session=st.integers(0, 6), client=peers, tokens=st.integers(-1, CONTEXT_TOKENS + 2))
    def open(self, session: int, client: PeerId, tokens: int) -> int:
        left = CACHE_TOKENS - sum(held[1] for held in self.model.values())
        admissible = (
            session not in self.model and 1 <= tokens <= min(left, CONTEXT_TOKENS) and len(self.model) < MAX_SESSIONS
        )
        try:
            self.table.open(opening(session=session, max_tokens=tokens), client, self.now_s)
        except (BadFrame, CacheFull):
            assert not admissible
        else:
            assert admissible
            self.model[session] = [client, tokens, 0, self.now_s]
        return session

    @rule(session=sessions, sender=peers, position=st.integers(-1, 62), rows=st.integers(-1, 62))
    def step(self, session: int, sender: PeerId, position: int, rows: int) -> None:
        held = self.model.get(session)
        try:
            self.table.step(step(position, rows, 0, session), RAW, sender, self.now_s)
        except UnknownSession:
            assert held is None or sender not in (held[0], BEFORE)
        except PositionGap:
            assert held is not None
            assert position > held[2]
        except BadFrame:
            assert held is not None
            assert rows < 1 or position < 0 or position + rows > held[1]
        else:
            assert held is not None
            assert sender in (held[0], BEFORE)
            assert 0 <= position <= held[2]
            assert 1 <= rows <= held[1] - position
            held[2:] = position + rows, self.now_s

    @rule(session=sessions, client=peers)
    def close(self, session: int, client: PeerId) -> None:
        mine = session in self.model and self.model[session][0] == client
        assert self.table.close(SessionId(session), client) == mine
        if mine:
            del self.model[session]

    @rule(client=peers)
    def lose(self, client: PeerId) -> None:
        gone = sorted(session for session, held in self.model.items() if held[0] == client)
        assert sorted(self.table.close_all_of(client)) == gone
        for session in gone:
            del self.model[session]

    @rule(elapsed_s=st.sampled_from([0.0, 1.0, 6.0, 11.0]))
    def wait(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s
        stale = sorted(session for session, held in self.model.items() if self.now_s - held[3] > IDLE_S)
        assert sorted(self.table.expire(self.now_s)) == stale
        for session in stale:
            del self.model[session]

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert len(self.table) == len(self.model)
        assert self.table.cache_tokens_left == CACHE_TOKENS - sum(held[1] for held in self.model.values())
        for session, held in self.model.items():
            there = self.table.get(SessionId(session))
            assert there is not None
            assert [there.client, there.max_tokens, there.end, there.seen_s] == held


TableMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestTable = TableMachine.TestCase
