"""The `bsns` command, one file per verb."""

import os
import signal
import sys

from bsns.cli.streams import open_missing

if os.path.basename(sys.argv[0]) in ("bsns", "-m"):  # the command itself, which for Python is called -m at first
    open_missing()
    # Ctrl-C while libraries load is no error to trace: there is nothing yet that would have to be put in order.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import asyncio
import contextlib

with contextlib.suppress(ImportError):  # not to be had on Windows
    import uvloop

    # it halves what the event loop adds to each hop (docs/decisions/0004-direct-streams.md)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

parent = os.getppid()
"""Whose process started this one, asked at once: it may be gone by the time a verb wants to know."""
