"""Journals: what a stage has sent on, kept so that a stage after it can be rebuilt (decision 0001). Pure."""

from __future__ import annotations

from collections.abc import Iterator

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

    @property
    def end(self) -> int:
        """How many positions there are."""
        return len(self._rows) // self.row_bytes

    def write(self, position: int, rows: Buffer, wanted: int) -> None:
        """Note a step's output. Raises PositionGap where it does not join what there is."""
        if position > self.end:
            raise PositionGap(f"a step sent on at {position} follows {self.end} rows; replay")
        del self._rows[position * self.row_bytes :]
        self._rows += rows
        self._last = (position, wanted)

    def replay(self) -> Iterator[tuple[int, bytes, int]]:
        """Everything as steps: position, rows, and how many of them are wanted, which only of the last are any."""
        start, wanted = self._last
        for position in range(0, start, REPLAY_ROWS):
            yield position, self._read(position, min(position + REPLAY_ROWS, start)), 0
        if start < self.end:
            yield start, self._read(start, self.end), wanted

    def _read(self, start: int, end: int) -> bytes:
        return bytes(self._rows[start * self.row_bytes : end * self.row_bytes])
