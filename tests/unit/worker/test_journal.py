"""Journals beside the plain list of rows they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.core.errors import PositionGap
from bsns.worker.journal import REPLAY_ROWS, Journal

STEPS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 200), st.integers(0, 1)), max_size=12)


@given(steps=STEPS)
def test_a_replay_is_what_was_sent_last_at_every_position(steps: list[tuple[int, int, int]]) -> None:
    journal = Journal(2)
    rows: list[bytes] = []
    last = (0, 0)
    for number, (position, count, wanted) in enumerate(steps):
        sent = [bytes((number, row % 256)) for row in range(count)]
        if position > len(rows):
            with pytest.raises(PositionGap):
                journal.write(position, b"".join(sent), wanted)
            continue
        journal.write(position, b"".join(sent), wanted)
        rows[position:] = sent
        last = (position, wanted)
    assert journal.end == len(rows)
    reached = 0
    while (step := journal.step(reached)) is not None:
        piece, wanted = step
        position = reached
        reached += len(piece) // 2
        assert piece == b"".join(rows[position:reached])
        assert len(piece) <= 2 * max(REPLAY_ROWS, 200)
        assert wanted == (last[1] if reached == len(rows) and position == last[0] else 0)
    assert reached == len(rows)


def test_what_does_not_stand_is_cut_off() -> None:
    journal = Journal(2)
    journal.write(0, b"aabbccdd", 2, turn=7)
    assert journal.turn == 7
    journal.cut(3)
    assert (journal.end, journal.step(0)) == (3, (b"aabbcc", 0))
    journal.cut(9)
    assert journal.end == 3
