"""The leash: a process that must not outlive the one that started it.

Two holds, because neither is enough: Linux kills a process whose parent dies if it asked for that (prctl 2,
PR_SET_PDEATHSIG), but asks for the thread that started it; everywhere a process whose parent has gone finds that it has
another one, but has to look. Both are told whom they began with, since a parent may die before they are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

PR_SET_PDEATHSIG = 1
LOOK_S = 0.25


def die_with_parent(parent: int) -> None:
    """Have this process killed as soon as process `parent`, which started it, is gone. Outside Linux only look once."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def ended_with_parent(parent: int, status: int) -> Iterator[None]:
    """Leave this process at once, with this status, when its parent is no longer `parent`: for while libraries load,
    and hold up the event loop. There must be nothing yet that would have to be put in order."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            if os.getppid() != parent:
                os._exit(status)

    looking = threading.Thread(target=look, name="leash", daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


async def watch_parent(task: asyncio.Task[Any] | None, parent: int) -> None:
    """Cancel `task` once this process has another parent than `parent`."""
    while os.getppid() == parent:  # noqa: ASYNC110  the kernel has no event to wait for
        await asyncio.sleep(LOOK_S)
    if task is not None:
        task.cancel()
