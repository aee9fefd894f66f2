"""What every verb shares: how it runs, what it prints where, and how it ends.

Answers and tables go to standard output, everything else to standard error. A user's mistake is one line, never a
traceback. Ctrl-C and SIGTERM end a verb in order; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console

from bsns.core.errors import BadOption, BsnsError, Remedy

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
JoinOption = Annotated[
    str,
    typer.Option("--join", envvar="BSNS_INVITE", help="The invite that a node printed; also read from BSNS_INVITE."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


def run(verb: Coroutine[Any, Any, None], *, as_json: bool = False) -> None:
    """Run a verb to its end; a typed error becomes one line (or one JSON object) and an exit status."""
    _quiet_logs()
    interrupted = False

    async def guarded() -> None:
        nonlocal interrupted
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            nonlocal interrupted
            if interrupted:
                os._exit(EXIT_INTERRUPTED)
            interrupted = True
            task.cancel()

        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, interrupt)
        await verb

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BsnsError as error:
        fail(error, as_json=as_json)


def fail(error: BsnsError, *, as_json: bool = False) -> None:
    """Print a typed error and end with its status."""
    if as_json:
        emit({"event": "error", "code": error.code, "message": error.message})
    else:
        err.print("[bold red]error:[/] ", end="")
        err.print(error.message, markup=False, highlight=False)
    raise typer.Exit(EXIT_USER if error.remedy is Remedy.TELL_USER else EXIT_FAILED)


def emit(value: Any) -> None:
    """One JSON value on a line of standard output, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def doing(what: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error while something takes its time; yields a function that changes its text."""
    if quiet or not err.is_terminal:
        yield lambda text: None
        return
    with err.status(what) as status:
        yield status.update


def parse_size(text: str | None) -> int | None:
    """`2GiB`, `500MB` or plain bytes. Raises BadOption."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    try:
        if match is None:
            raise ValueError
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** units[unit.upper()])
    except ValueError:
        raise BadOption(f"{text!r} is not a size; write for example 2GiB or 500MB") from None
    if size <= 0:
        raise BadOption(f"{text!r} is not a size above zero")
    return size


def _quiet_logs() -> None:
    """Our own log at BSNS_LOG (default: warning), on standard error; libraries only when they warn."""
    level = os.environ.get("BSNS_LOG", "warning").upper()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level, logging.WARNING)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
