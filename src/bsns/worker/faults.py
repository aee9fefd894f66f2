"""A worker that fails on demand, for tests and benchmarks of survival.

A developer asks for it with BSNS_FAULTS=1. SIGUSR1 then makes the node a hundred times slower, SIGUSR2 makes what it
sends unreadable; the same signal again undoes it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

from bsns.core.ids import PeerId
from bsns.protocol.frames import Buffer
from bsns.worker.batching import Batch, Work
from bsns.worker.executor import Executor
from bsns.worker.service import Outputs, Worker

VARIABLE = "BSNS_FAULTS"
SLOW_FACTOR = 100.0


def worker_class() -> type[Worker]:
    """The worker to serve with: one that fails on demand where a developer's environment asks for it."""
    return FaultyWorker if os.environ.get(VARIABLE) else Worker


class FaultyWorker(Worker):
    """See Worker."""

    slow = False
    garbled = False

    def heed_signals(self) -> None:
        """Take SIGUSR1 and SIGUSR2 as orders."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._turn_slow)
        loop.add_signal_handler(signal.SIGUSR2, self._turn_garbled)

    def _turn_slow(self) -> None:
        self.slow = not self.slow

    def _turn_garbled(self) -> None:
        self.garbled = not self.garbled

    def _run(self, executor: Executor, batch: Batch) -> Outputs | Exception:
        started_s = time.perf_counter()
        outputs = super()._run(executor, batch)
        if self.slow:
            time.sleep((SLOW_FACTOR - 1) * (time.perf_counter() - started_s))
        return outputs

    def _pass_on(
        self, forward: bool, peer: PeerId, codec: str, members: list[tuple[Work, Buffer]], computed: tuple[float, int]
    ) -> None:
        if self.garbled:
            members = [(work, output[: memoryview(output).nbytes // 2]) for work, output in members]
        super()._pass_on(forward, peer, codec, members, computed)
