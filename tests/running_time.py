"""A clock for bounds on what code waits for: it stands still while this process cannot run.

Another guest of the same host, or the collection of garbage of a whole test suite, stops a process for a second now
and then, and others on the same cores slow it down. That is not what a bound like "within 0.3 s, or a deadline was
waited for" is about.
"""

from __future__ import annotations

import threading
import time

TICK_S = 0.005
MOST_S = 0.01
"""What one tick counts at most: itself, and what a busy thread keeps the interpreter's lock for (its switch interval).
Code that held the lock for longer would be let off, too."""


class _Clock(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="running-time", daemon=True)
        self.now_s = 0.0
        self.start()

    def run(self) -> None:
        before_s = time.monotonic()
        while True:
            time.sleep(TICK_S)
            after_s = time.monotonic()
            self.now_s += min(after_s - before_s, MOST_S)
            before_s = after_s


_clock = _Clock()


def running_s() -> float:
    """Seconds for which this process has been able to run."""
    return _clock.now_s
