"""The leash: a process ends when the one that started it is gone, however early that was."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import psutil
import pytest

from bsns.node.leash import watch_parent

LEASHED = """
import os, sys, time
from bsns.node.leash import die_with_parent
die_with_parent(int(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's leash is Linux's")
def test_it_dies_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, LEASHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.kill()
        parent.wait()
        give_up_s = time.monotonic() + 5
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < give_up_s
    except psutil.NoSuchProcess:
        pass
    finally:
        parent.communicate()
        if child.is_running():
            child.kill()


def test_a_parent_that_is_gone_already_ends_it() -> None:
    """As if its parent, process 1 to name one that is not, had died before the leash was put on."""
    child = subprocess.run([sys.executable, "-c", LEASHED, "1"], capture_output=True, text=True, timeout=30)
    assert child.returncode == -9
    assert child.stdout == ""


async def test_a_task_is_cancelled_when_the_parent_is_another() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    await asyncio.wait_for(watch_parent(task, os.getpid()), 5)  # nobody is its own parent
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nothing_happens_while_the_parent_lives() -> None:
    task = asyncio.create_task(asyncio.sleep(0.05))
    watching = asyncio.create_task(watch_parent(task, os.getppid()))
    await task
    assert not watching.done()
    watching.cancel()


HELD_UP = """
import sys, time
from bsns.node.leash import ended_with_parent
with ended_with_parent(int(sys.argv[1]), 7):
    time.sleep(float(sys.argv[2]))  # no event loop gets to look
print("on")
"""


def test_while_the_loop_is_held_up_a_thread_looks() -> None:
    gone = subprocess.run([sys.executable, "-c", HELD_UP, "1", "60"], capture_output=True, text=True, timeout=30)
    assert (gone.returncode, gone.stdout) == (7, "")
    here = [sys.executable, "-c", HELD_UP, str(os.getpid()), "0.6"]
    assert subprocess.run(here, capture_output=True, text=True, timeout=30).stdout == "on\n"
