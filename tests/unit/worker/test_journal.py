"""Journals beside the plain list of rows they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.core.errors import PositionGap
from bsns.protocol.inference import MAX_UNDER_WAY
from bsns.worker.journal import REPLAY_ROWS, Journal

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200), st.integers(0, 1)), max_size=12)


@given(steps=STEPS)
def test_a_replay_is_what_was_sent_last_at_every_position(steps: list[tuple[int, int, int]]) -> None:
    journal = Journal(2)
    rows: list[bytes] = []
    asked: dict[int, tuple[int, int, int]] = {}
    for number, (position, count, wanted) in enumerate(steps):
        sent = [bytes((number, row % 256)) for row in range(count)]
        if position > len(rows):
            with pytest.raises(PositionGap):
                journal.write(position, b"".join(sent), wanted, number)
            continue
        journal.write(position, b"".join(sent), wanted, number)
        rows[position:] = sent
        asked = {start: step for start, step in asked.items() if step[0] <= position}
        if wanted:
            asked[position] = len(rows), wanted, number
            asked = dict(list(asked.items())[-MAX_UNDER_WAY:])
    assert journal.end == len(rows)
    reached = 0
    while (step := journal.step(reached)) is not None:
        piece, wanted, turn = step
        position = reached
        reached += len(piece) // 2
        assert piece == b"".join(rows[position:reached])
        assert len(piece) <= 2 * max(REPLAY_ROWS, 200)
        if wanted:
            assert asked.pop(position) == (reached, wanted, turn)
    assert reached == len(rows)
    assert not asked, "what may not have come back is wanted again"


def test_what_does_not_stand_is_cut_off() -> None:
    journal = Journal(2)
    journal.write(0, b"aabbccdd", 2, turn=7)
    assert journal.step(1) == (b"bbccdd", 2, 7)
    journal.cut(3)
    assert (journal.end, journal.step(0)) == (3, (b"aabbcc", 0, 0))
    journal.cut(9)
    assert journal.end == 3
