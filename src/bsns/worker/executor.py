"""The executor port: what runs a stage's batches. A second implementation must equal the first, batch by batch."""

from __future__ import annotations

from typing import Protocol

from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.worker.batching import Batch


class Executor(Protocol):
    """Blocks and the KV caches behind them. `run` may be called from any thread, but one call at a time; the rest from
    the event loop's, also while `run` goes on."""

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> BlockRange: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def device(self) -> str: ...

    def open(self, session: SessionId, max_tokens: int) -> None:
        """Make room for a session; the table has already checked that it fits."""
        ...

    def close(self, session: SessionId) -> None:
        """Free a session's cache; unknown sessions are ignored."""
        ...

    def run(self, batch: Batch) -> list[memoryview]:
        """Run one batch; for each of its works the (rows, hidden) output bytes, in the executor's dtype.

        A step at position p overwrites everything from p on. A work whose session was closed meanwhile is computed
        against an empty cache and its output means nothing.
        """
        ...
