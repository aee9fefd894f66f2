"""Virtual time: an event loop that jumps to whatever happens next, machines whose computing only takes time, clocks."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

EPOCH_S = 1_800_000_000.0
"""The Unix time at which every simulation begins."""
TICK_S = 1e-9
"""What happens within this time of each other happens at once."""
FOLLOWS_S = 2 * TICK_S
"""After this, whatever follows from what a process has just done has happened."""


class Stalled(Exception):
    """Everybody waits, and nothing will ever happen: a defect of what is simulated, or of the simulator."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without files, sockets or threads, whose time passes only while everybody waits.

    What is run in an executor is run at once; its outcome comes when what that takes on a machine (`spend`) is over.
    """

    def __init__(self) -> None:
        self._passed_s = 0.0
        super().__init__(_Jump(self))
        self._clock_resolution = TICK_S
        self._jobs: list[tuple[Process, float]] | None = None

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

    def spend(self, process: Process, seconds: float) -> None:
        """Whatever runs now in an executor takes a process so long on its machine."""
        if self._jobs is not None:
            self._jobs.append((process, seconds))

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
                process, seconds = jobs.pop(0)
                process.run(seconds, settle)
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
    """Cores that processes take turns on: who comes while all are busy waits in line."""

    def __init__(self, loop: VirtualLoop, cores: int = 1) -> None:
        self.loop = loop
        self._free = cores
        self._line: deque[Process] = deque()

    def enter(self, process: Process) -> None:
        """Let a process have a core as soon as it is its turn."""
        self._line.append(process)
        self._serve()

    def leave(self) -> None:
        """A process needs its core no more."""
        self._free += 1
        self._serve()

    def _serve(self) -> None:
        while self._free and self._line:
            self._free -= 1
            self._line.popleft().go()


class Process:
    """Does one thing at a time on a machine, and keeps its core as long as it has something to do."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._heard: list[Callable[[], None]] = []
        self._jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self._present = False
        """In line, or on a core."""
        self.busy_s = 0.0
        """Core seconds spent so far."""

    def hear(self, then: Callable[[], None]) -> None:
        """Call once the process has a core and computes nothing, before it computes again."""
        self._heard.append(then)
        self._enter()

    def run(self, seconds: float, then: Callable[[], None]) -> None:
        """Compute for so many core seconds, then call."""
        self._jobs.append((seconds, then))
        self._enter()

    def _enter(self) -> None:
        if not self._present:
            self._present = True
            self._machine.enter(self)

    def go(self) -> None:
        """There is a core."""
        loop = self._machine.loop
        if self._heard:
            heard, self._heard = self._heard, []
            for then in heard:
                then()
            loop.call_later(FOLLOWS_S, self.go)
        elif self._jobs:
            seconds, then = self._jobs.popleft()
            self.busy_s += seconds
            loop.call_later(seconds, self._end, then)
        else:
            self._present = False
            self._machine.leave()

    def _end(self, then: Callable[[], None]) -> None:
        then()
        self._machine.loop.call_later(FOLLOWS_S, self.go)
