"""Journals: what a stage has sent on, kept so that a stage after it can be rebuilt (decision 0001). Pure."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from bsns.core.errors import PositionGap
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import MAX_UNDER_WAY

REPLAY_ROWS = 128
"""Rows in one step of a replay: as many as in a chunk of a prompt."""


class Again(NamedTuple):
    """One step of a replay."""

    rows: bytes
    wanted: int = 0
    """How many of the last ones the client wants."""
    turn: int = 0


class _Wanted(NamedTuple):
    """A step [start, end) of which the client wanted so many rows, in which turn."""

    start: int
    end: int
    wanted: int
    turn: int


class Journal:
    """The rows that one session has sent downstream, as they were sent, from position 0 on.

    As in a cache, what is written at a position overwrites everything from there on.
    """

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._rows = bytearray()
        self._wanted: deque[_Wanted] = deque(maxlen=MAX_UNDER_WAY)
        """The steps whose rows may not have come back to the client, in the order of their places."""

    @property
    def end(self) -> int:
        """How many positions there are."""
        return len(self._rows) // self.row_bytes

    @property
    def nbytes(self) -> int:
        return len(self._rows)

    def cut(self, end: int) -> None:
        """Forget what lies beyond so many positions, and what was wanted."""
        del self._rows[end * self.row_bytes :]
        self._wanted.clear()

    def write(self, position: int, rows: Buffer, wanted: int, turn: int = 0) -> None:
        """Note a step's output. Raises PositionGap where it does not join what there is."""
        if position > self.end:
            raise PositionGap(f"a step sent on at {position} follows {self.end} rows; replay")
        del self._rows[position * self.row_bytes :]
        self._rows += rows
        # one that is overwritten in part has come back: the client knows which of its guesses was wrong
        while self._wanted and self._wanted[-1].end > position:
            self._wanted.pop()
        if wanted:
            self._wanted.append(_Wanted(position, self.end, wanted, turn))

    def step(self, position: int) -> Again | None:
        """The next step of a replay that has come to `position`; None at the end."""
        if position >= self.end:
            return None
        end = min(position + REPLAY_ROWS, self.end)
        for step in self._wanted:
            if position < step.start:
                end = min(end, step.start)
                break
            if position < step.end:
                return Again(self._read(position, step.end), min(step.wanted, step.end - position), step.turn)
        return Again(self._read(position, end))

    def _read(self, start: int, end: int) -> bytes:
        return bytes(self._rows[start * self.row_bytes : end * self.row_bytes])
