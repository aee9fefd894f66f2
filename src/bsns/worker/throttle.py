"""The throttled executor: another executor on a slower machine, for emulated swarms.

A developer asks for it with BSNS_BLOCK_TIME_MS. A batch takes at least as long as it would at that many milliseconds a
block for one row, growing with its rows as `worker.service` expects; the rest of the time is slept, so that the
processor is free for the other nodes of this machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import SessionId
from bsns.core.plan import block_times
from bsns.worker.batching import Batch
from bsns.worker.executor import Executor

VARIABLE = "BSNS_BLOCK_TIME_MS"
MAX_BLOCK_TIME_MS = 10_000.0


T = TypeVar("T", bound=Executor)


def throttled(executor: T) -> T | ThrottledExecutor:
    """The executor, as slow as a developer's environment asks for. Raises BadOption."""
    block_time_s = asked_block_time_s(os.environ.get(VARIABLE))
    return executor if block_time_s is None else ThrottledExecutor(executor, block_time_s)


class ThrottledExecutor:
    """See worker.executor.Executor. `sleeps` and `slept_s` count what was added to the executor inside."""

    def __init__(
        self,
        inner: Executor,
        block_time_s: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._inner = inner
        self._block_time_s = block_time_s
        self._clock = clock
        self._sleep = sleep
        self.sleeps = 0
        self.slept_s = 0.0

    @property
    def name(self) -> str:
        return f"{self._inner.name}, throttled"

    @property
    def blocks(self) -> BlockRange:
        return self._inner.blocks

    @property
    def hidden_size(self) -> int:
        return self._inner.hidden_size

    @property
    def dtype(self) -> str:
        return self._inner.dtype

    @property
    def device(self) -> str:
        return self._inner.device

    def open(self, session: SessionId, max_tokens: int) -> None:
        self._inner.open(session, max_tokens)

    def close(self, session: SessionId) -> None:
        self._inner.close(session)

    def run(self, batch: Batch) -> list[memoryview]:
        end_s = self._clock() + self.least_s(len(batch.blocks), batch.rows)
        outputs = self._inner.run(batch)
        left_s = end_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
            self.sleeps += 1
            self.slept_s += left_s
        return outputs

    def least_s(self, blocks: int, rows: int) -> float:
        """What a batch takes at least."""
        return self._block_time_s * blocks * block_times(rows)


def asked_block_time_s(text: str | None) -> float | None:
    """The time a block shall take by the environment variable's text, if there is one. Raises BadOption."""
    if not text:
        return None
    try:
        block_time_ms = float(text)
    except ValueError:
        block_time_ms = math.nan
    if not 0 < block_time_ms <= MAX_BLOCK_TIME_MS:
        raise BadOption(f"{VARIABLE} is {text[:32]!r}; give milliseconds above 0, up to {MAX_BLOCK_TIME_MS:g}")
    return block_time_ms / 1e3
