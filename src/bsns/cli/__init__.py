"""The `bsns` command, one file per verb."""

import asyncio
import contextlib

with contextlib.suppress(ImportError):  # not to be had on Windows
    import uvloop

    # it halves what the event loop adds to each hop (docs/decisions/0004-direct-streams.md)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
