"""Journals: what a stage has sent on, kept so that a stage after it can be rebuilt (decision 0001). Pure."""

from __future__ import annotations

from bsns.core.errors import PositionGap
from bsns.protocol.frames import Buffer

REPLAY_ROWS = 128
"""Rows in one step of a replay: as many as in a chunk of a prompt."""


class Journal:
    """The rows that one session has sent downstream, as they were sent, from position 0 on.

    As in a cache, what is written at a position overwrites everything from there on.
    """

    def __init__(self, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._rows = bytearray()
        self._last = (0, 0)
        """Where the step that was written last begins, and how many of its rows the client wants."""
        self.turn = 0
        """The client's turn in which it was sent."""

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
        self._last = (self.end, 0)

    def write(self, position: int, rows: Buffer, wanted: int, turn: int = 0) -> None:
        """Note a step's output. Raises PositionGap where it does not join what there is."""
        if position > self.end:
            raise PositionGap(f"a step sent on at {position} follows {self.end} rows; replay")
        del self._rows[position * self.row_bytes :]
        self._rows += rows
        self._last, self.turn = (position, wanted), turn

    def step(self, position: int) -> tuple[bytes, int] | None:
        """The rows of the next step of a replay that has come to `position`, and how many of them are wanted: only of
        the step written last are any. None at the end."""
        start, wanted = self._last
        if position >= self.end:
            return None
        if position < start:
            return self._read(position, min(position + REPLAY_ROWS, start)), 0
        return self._read(position, self.end), min(wanted, self.end - position)

    def _read(self, start: int, end: int) -> bytes:
        return bytes(self._rows[start * self.row_bytes : end * self.row_bytes])
