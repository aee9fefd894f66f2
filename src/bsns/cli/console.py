"""What every verb shares: how it runs, what it prints where, and how it ends.

Answers and tables go to standard output, everything else to standard error. A user's mistake is one line, never a
traceback. Ctrl-C, SIGTERM and SIGHUP end a verb in order; a second Ctrl-C ends it at once. However it ends, none of its
processes stays behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar, cast

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from bsns.cli.logs import LogFormat, log_to_stderr
from bsns.core.errors import BadOption, BsnsError, NotAMember, PeerFailed, Remedy, WrongSwarm

T = TypeVar("T")

out = Console(soft_wrap=True, emoji=False)
err = Console(stderr=True, soft_wrap=True, emoji=False)

Dtype = Literal["auto", "float32", "bfloat16"]
ExecutorName = Literal["auto", "native", "torch"]
Quant = Literal["none", "int8", "int4"]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
JoinOption = Annotated[
    str,
    typer.Option("--join", envvar="BSNS_INVITE", metavar="INVITE", help="The invite that the swarm's founder printed."),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", metavar="TYPE", help="auto (as the swarm does), float32 or bfloat16.")
]
ExecutorOption = Annotated[
    ExecutorName,
    typer.Option("--executor", metavar="NAME", help="What computes: auto (native where it can), native or torch."),
]
QuantOption = Annotated[
    Quant,
    typer.Option("--quant", metavar="TYPE", help="Keep weights in fewer bits: none, int8 or int4."),
]
KvOption = Annotated[
    Literal["none", "int8"],
    typer.Option("--kv", metavar="TYPE", help="Keep keys and values of what was read in fewer bits: none or int8."),
]
MOST_THREADS = 1024
"""As many as the native kernels take (native/api.cpp)."""
ThreadsOption = Annotated[
    int,
    typer.Option("--threads", min=1, max=MOST_THREADS, metavar="N", help="Threads for this end's share of the work."),
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="smollm2-135m, a directory, a .gguf file or a Hugging Face id."),
]

EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130

IMPATIENT_S = 0.3
"""A terminal and a wrapper such as make may both pass on one Ctrl-C; only one later than this is a second one."""
THREADS_S = 0.5
"""How long threads that nobody waits for any more may hold up the end."""


class Say(Protocol):
    """Tells a person what is being done, on a line of its own, and how much of it (0 to 1) where that is known."""

    def __call__(self, what: str, done: float | None = None, *, line: int = 0) -> None: ...


class _Signals:
    """SIGINT, SIGTERM and SIGHUP as the cancellation of one task."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup, or a background job of a script
                signal.signal(signum, self._on_signal)

    def cancel_from_now_on(self, task: asyncio.Task[Any]) -> None:
        self._loop, self._task = asyncio.get_running_loop(), task

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if signum == signal.SIGHUP:  # the terminal is gone: writing to it would fail
            err.quiet = out.quiet = True
        if self._loop is None or self._task is None:  # still importing: there is nothing to put in order
            leave(EXIT_INTERRUPTED)
        if self.first_s is None:
            self.first_s = now_s
            self._loop.call_soon_threadsafe(self._task.cancel)
        elif signum in (signal.SIGINT, signal.SIGTERM) and now_s - self.first_s > IMPATIENT_S:
            leave(EXIT_INTERRUPTED)


def run(
    verb: Coroutine[Any, Any, None],
    *,
    as_json: bool = False,
    leashed: bool = False,
    log_format: LogFormat | None = None,
) -> None:
    """Run a verb to its end; an error becomes one line (with `as_json` also an object) and an exit status."""
    try:
        log_to_stderr(format_=log_format)
    except BadOption as error:
        verb.close()
        raise typer.Exit(_fail(error, as_json=as_json, leashed=leashed)) from None
    signals = _Signals()
    status = 0

    async def guarded() -> None:
        nonlocal status
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        executor = ThreadPoolExecutor(thread_name_prefix="bsns")
        loop.set_default_executor(executor)
        # Called when the verb waits for the first time: until then it has only imported its libraries.
        loop.call_soon(signals.cancel_from_now_on, task)
        try:
            await verb
        except asyncio.CancelledError:
            status = EXIT_INTERRUPTED
            if err.is_terminal:  # the shell's next line shall not begin behind ^C
                with contextlib.suppress(OSError):
                    err.print()
        except BrokenPipeError:  # whoever read our output has gone
            status = EXIT_FAILED
        except BsnsError as error:
            status = _fail(error, as_json=as_json, leashed=leashed)
        except Exception as error:  # noqa: BLE001  a person gets a line, whatever it is
            status = _surprised(error, as_json=as_json, leashed=leashed)
        if not _finished(executor):
            # A thread is loading a model still. Neither asyncio nor the interpreter would end before it does.
            leave(status)

    asyncio.run(guarded())
    if status:
        _flush()
        raise typer.Exit(status)


def leave(status: int) -> NoReturn:
    """End this process now, and the processes it has started."""
    _end_children()
    with contextlib.suppress(OSError):
        err.show_cursor()
    _flush()
    os._exit(status)


def settle() -> None:
    """What is here by now stays: a full collection of garbage would look through it each time, for a quarter of a
    second in which nobody gets a token."""
    gc.collect()
    gc.freeze()


async def from_thread(read: Callable[[], T]) -> T:
    """What `read` returns. It may wait for a person for ever: nobody, not even the end of the process, waits for it."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(cast(T, value))

    def work() -> None:
        value, error = None, None
        try:
            value = read()
        except Exception as raised:  # noqa: BLE001  crosses to the caller
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: it was not waited for
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name="reader", daemon=True).start()
    return await answer


async def see_through(ending: Coroutine[Any, Any, None]) -> None:
    """Put things in order to the end, even if a signal comes meanwhile; the cancellation it asks for follows then."""
    task = asyncio.ensure_future(ending)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as signalled:
            cancelled = signalled
    if cancelled is not None:
        raise cancelled
    task.result()


def emit(value: Any) -> None:
    """One JSON value on a line of standard output, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def doing(what: str, *, quiet: bool = False) -> Iterator[Say]:
    """A spinner on standard error while something takes its time; yields what changes its text."""
    if quiet or err.quiet or not err.is_terminal:
        yield _silent
        return
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        _KnownBar(),
        _KnownTime(),
        console=err,
        transient=True,
    ) as progress:
        lines: dict[int, TaskID] = {0: progress.add_task(what, total=None)}

        def say(what: str, done: float | None = None, *, line: int = 0) -> None:
            if line not in lines:
                lines[line] = progress.add_task(what, total=None)
            progress.update(lines[line], description=what, total=None if done is None else 1.0, completed=done or 0.0)

        yield say


def _silent(what: str, done: float | None = None, *, line: int = 0) -> None:
    """Says nothing: standard error is not a terminal, or a program reads along."""


class _KnownBar(BarColumn):
    """A bar for what has a known end; nothing for the rest, where a bar would say nothing."""

    def render(self, task: Task) -> Any:
        return Text("") if task.total is None else super().render(task)


class _KnownTime(ProgressColumn):
    """Seconds since the line came up, once there are any."""

    def render(self, task: Task) -> Text:
        seconds = int(task.elapsed or 0)
        return Text(f"{seconds} s" if seconds else "", style="progress.elapsed")


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
    except (ValueError, OverflowError):
        raise BadOption(f"{text!r} is not a size; write for example 2GiB or 500MB") from None
    if size <= 0:
        raise BadOption(f"{text!r} is not a size above zero")
    return size


def chosen_invite(context: typer.Context, join: str | None, *, instead: bool) -> str | None:
    """The invite of --join; one that only the environment holds gives way where something else was named `instead`."""
    source = context.get_parameter_source("join")
    return None if instead and source is not None and source.name == "ENVIRONMENT" else join


DAY_S = 86400.0


def a_number(value: float) -> float:
    """The callback of options with bounds: older versions of Typer find NaN within any. Raises typer.BadParameter."""
    if math.isnan(value):
        raise typer.BadParameter(f"{value} is not a number.")
    return value


def parse_seconds(text: str) -> float:
    """`2s`, `500ms`, `1.5` or `1m` in seconds. Raises BadOption."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(ms|s|m|)", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadOption(f"{text!r} is not a time; write for example 2s, 500ms or 1m")
    seconds = float(match[1]) * {"ms": 1e-3, "m": 60.0}.get(match[2].lower(), 1.0)
    if not 0 < seconds <= DAY_S:
        raise BadOption(f"{text!r} is not a time above zero and up to a day")
    return seconds


def tell(line: str, style: str = "") -> None:
    """One line on standard output, as it stands: nothing in it is taken for markup."""
    out.print(line, style=style or None, markup=False, highlight=False)


def say_aside(line: str) -> None:
    """One line on standard error about something that does not stand in the way."""
    err.print(line, style="yellow", markup=False, highlight=False)


def say_error(message: str) -> None:
    """One line on standard error, however the message is laid out. Where it cannot be written, the status has to do."""
    with contextlib.suppress(OSError):
        err.print("[bold red]error:[/] ", end="")
        err.print(" ".join(message.split()), markup=False, highlight=False)


def _fail(error: BsnsError, *, as_json: bool, leashed: bool) -> int:
    message = error.message
    if isinstance(error, NotAMember | WrongSwarm):
        message += "; is this the invite of that swarm? its founder can make another"
    if as_json:
        with contextlib.suppress(OSError):  # what cannot be written may be the error
            emit({"event": "error", "code": error.code, "message": message})
    if not leashed:  # whoever holds the leash reads the object
        say_error(message)
    return EXIT_USER if error.remedy is Remedy.TELL_USER else EXIT_FAILED


def _surprised(error: Exception, *, as_json: bool, leashed: bool) -> int:
    if os.environ.get("BSNS_LOG", "").lower() == "debug":
        traceback.print_exception(error)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if isinstance(error, OSError | MemoryError) else " (unexpected; BSNS_LOG=debug shows where)"
    return _fail(PeerFailed(what + hint), as_json=as_json, leashed=leashed)


def _finished(executor: ThreadPoolExecutor) -> bool:
    """Whether the threads of `executor` are done, or are soon once their child processes have ended."""
    executor.shutdown(wait=False, cancel_futures=True)
    threads = list(executor._threads)
    if any(thread.is_alive() for thread in threads):
        deadline_s = time.monotonic() + THREADS_S
        for thread in threads:
            thread.join(max(0.05, (deadline_s - time.monotonic()) / 2))
        if any(thread.is_alive() for thread in threads):
            _end_children()  # a thread that waits for one, such as a model's converter, now cleans up after it
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _end_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _flush() -> None:
    """Write out what is buffered; a reader that has gone must not become a complaint of the interpreter's."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except RuntimeError:  # a signal came in the middle of another flush
            continue
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
