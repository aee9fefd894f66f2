"""Virtual time: an event loop that jumps to whatever happens next, machines whose computing only takes time, clocks."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

EPOCH_S = 1_800_000_000.0
"""The Unix time at which every simulation begins."""
TICK_S = 1e-9
"""What happens within this time of each other happens at once."""


class Stalled(Exception):
    """Everybody waits, and nothing will ever happen: a defect of what is simulated, or of the simulator."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without files, sockets or threads, whose time passes only while everybody waits.

    What is run in an executor is run at once; its outcome comes when the machines that it used (`spend`) are through.
    """

    def __init__(self) -> None:
        self._passed_s = 0.0
        super().__init__(_Jump(self))
        self._clock_resolution = TICK_S
        self._jobs: list[tuple[Machine, float]] | None = None

    def time(self) -> float:
        return self._passed_s

    def now_s(self) -> float:
        """Seconds since the simulation began (transport.clock.Clock)."""
        return self._passed_s + (sum(seconds for _, seconds in self._jobs) if self._jobs else 0.0)

    def unix_s(self) -> float:
        """See transport.clock.Clock."""
        return EPOCH_S + self._passed_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._passed_s += seconds

    def spend(self, machine: Machine, seconds: float) -> None:
        """Whatever runs now in an executor takes so long on a machine that has nothing else to do."""
        if self._jobs is not None:
            self._jobs.append((machine, seconds))

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        self._jobs, before = [], self._jobs
        try:
            outcome: T | Exception = func(*args)
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits for the outcome
            outcome = error
        jobs, self._jobs = self._jobs, before

        def settle() -> None:
            if jobs:
                machine, seconds = jobs.pop(0)
                machine.run(seconds, settle)
            elif not future.done():
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

        self.call_soon(settle)
        return future


class OwnClock:
    """The clock of one machine (transport.clock.Clock): the loop's, but for a time of day that may be wrong."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.ahead_s = 0.0
        """How far its time of day is ahead of the others'; negative: behind."""

    def now_s(self) -> float:
        return self._loop.now_s()

    def unix_s(self) -> float:
        return self._loop.unix_s() + self.ahead_s


class _Jump(selectors.BaseSelector):
    """Stands where a loop waits for files: nobody waits, the time passes."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._inner = selectors.SelectSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stalled("everybody waits, and nothing will happen any more")
        if timeout > 0:
            self._loop.advance(timeout)
        return []


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a simulation to its end. Raises what it raises, and Stalled."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        return runner.run(main(loop))


class Machine:
    """Cores that share what is to be computed: of more jobs than cores each gets its part."""

    def __init__(self, loop: VirtualLoop, cores: int = 1) -> None:
        self._loop = loop
        self.cores = cores
        self._left: dict[int, tuple[float, Callable[[], None]]] = {}
        self._count = 0
        self._since_s = 0.0
        self._next: asyncio.TimerHandle | None = None
        self.busy_s = 0.0
        """Core seconds spent so far."""

    def run(self, seconds: float, then: Callable[[], None]) -> None:
        """Compute for so many core seconds, then call."""
        self._pass()
        self._count += 1
        self._left[self._count] = (seconds, then)
        self._plan()

    @property
    def _rate(self) -> float:
        return min(1.0, self.cores / len(self._left)) if self._left else 0.0

    def _pass(self) -> None:
        """Take off every job what has been computed since we looked last."""
        done_s = (self._loop.time() - self._since_s) * self._rate
        self._since_s = self._loop.time()
        self.busy_s += done_s * len(self._left)
        self._left = {job: (seconds - done_s, then) for job, (seconds, then) in self._left.items()}

    def _plan(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._left:
            least_s = min(seconds for seconds, _ in self._left.values())
            self._next = self._loop.call_later(max(0.0, least_s) / self._rate, self._finish)

    def _finish(self) -> None:
        self._pass()
        done = [job for job, (seconds, _) in self._left.items() if seconds <= TICK_S]
        for then in [self._left.pop(job)[1] for job in done]:
            then()
        self._plan()
