"""The leash: a process that must not outlive the one that started it.

Two holds, because neither is enough: Linux kills a process whose parent thread dies if it asked for that (prctl 2,
PR_SET_PDEATHSIG); everywhere, a process whose parent has gone finds its standard input closed or its parent changed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
LOOK_S = 0.5


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies. Does nothing outside Linux."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGKILL)


async def watch_parent(task: asyncio.Task[Any] | None) -> None:
    """Cancel `task` once this process has another parent than now."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110  the kernel has no event to wait for
        await asyncio.sleep(LOOK_S)
    if task is not None:
        task.cancel()
