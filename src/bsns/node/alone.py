"""A range of blocks in this process, computed as a node of it would, without a network."""

from __future__ import annotations

from collections.abc import Sequence

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.model.source import ModelSource
from bsns.node.executors import choose_executor, load_executor
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import Part
from bsns.worker.batching import Batch, Work
from bsns.worker.sessions import Session


class Alone:
    """Not thread-safe, but for `end`."""

    def __init__(self, source: ModelSource, blocks: BlockRange, *, dtype: str, threads: int = 1) -> None:
        choice = choose_executor(source, blocks, device="cpu")
        self._executor = load_executor(choice, source, blocks, dtype=dtype, device="cpu", threads=threads)
        self.name, self.hidden_size, self.blocks = self._executor.name, self._executor.hidden_size, blocks
        self._sessions: dict[int, Session] = {}

    def __len__(self) -> int:
        """How many sequences there is room for now."""
        return len(self._sessions)

    def open(self, number: int, max_tokens: int) -> None:
        """Make room for a sequence, anew if there was one of that number."""
        id_ = SessionId(number)
        self._executor.open(id_, max_tokens)
        self._sessions[number] = Session(id_, PeerId("alone"), self.blocks, max_tokens, 1, None, None, ())

    def end(self, number: int) -> None:
        """Free a sequence; from any thread."""
        self._executor.close(self._sessions.pop(number).id)

    def close(self) -> None:
        """Free all sequences."""
        for number in list(self._sessions):
            self.end(number)

    def run(self, steps: Sequence[tuple[int, int, int, Buffer]]) -> list[memoryview]:
        """One batch: of each step the sequence's number, the position, the rows and their bytes."""
        works = [
            Work(self._sessions[number], Part(SessionId(number), position, rows, rows), hidden, 0.0)
            for number, position, rows, hidden in steps
        ]
        return self._executor.run(Batch(self.blocks, works))
