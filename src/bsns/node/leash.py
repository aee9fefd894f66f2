"""The leash: a process that must not outlive the one that started it.

Two holds, because neither is enough: Linux kills a process whose parent dies if it asked for that (prctl 2,
PR_SET_PDEATHSIG), but asks for the thread that started it; everywhere a process whose parent has gone finds that it has
another one, but has to look. Both are told whom they began with, since a parent may die before they are called.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
LOOK_S = 0.25


def die_with_parent(parent: int) -> None:
    """Have this process killed as soon as process `parent`, which started it, is gone. Outside Linux only look once."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


async def watch_parent(task: asyncio.Task[Any] | None, parent: int) -> None:
    """Cancel `task` once this process has another parent than `parent`."""
    while os.getppid() == parent:  # noqa: ASYNC110  the kernel has no event to wait for
        await asyncio.sleep(LOOK_S)
    if task is not None:
        task.cancel()
