"""How a verb runs and ends: statuses, one-line errors, signals, threads that hang, clean-up that is seen through."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest
import typer
from rich.console import Console
from running_time import running_s

from bsns.cli import console, logs
from bsns.core.errors import BadOption, MissingBlocks, NotAMember


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    known = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {signum: signal.getsignal(signum) for signum in known}
    for signum in known:
        signal.signal(signum, signal.SIG_DFL)
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    console.err.quiet = console.out.quiet = False


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which the process would have been left at once."""
    statuses: list[int] = []

    def leave(status: int) -> NoReturn:
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(console, "leave", leave)
    return statuses


def status_of(error: BaseException, **options: bool) -> int:
    async def verb() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        console.run(verb(), **options)
    return ended.value.exit_code


def test_the_status_tells_whose_fault_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(BadOption("x is wrong")) == 2
    assert status_of(MissingBlocks("nobody holds 1:2")) == 1
    assert status_of(RuntimeError("surprise")) == 1
    assert status_of(OSError(28, "No space left on device")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: x is wrong",
        "error: nobody holds 1:2",
        "error: RuntimeError: surprise (unexpected; BSNS_LOG=debug shows where)",
        "error: OSError: [Errno 28] No space left on device",
    ]


def test_an_error_is_one_line_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(BadOption("[bold]one\n\n  two[/]  [/three]"))
    assert capsys.readouterr().err == "error: [bold]one two[/] [/three]\n"


def test_a_stranger_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(NotAMember("refused"))
    assert "its founder can make another" in capsys.readouterr().err


def test_an_unknown_log_format_is_told_before_anything_is_begun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSNS_LOG_FORMAT", "xml")

    async def verb() -> None:
        pytest.fail("it was begun")

    with pytest.raises(typer.Exit) as ended:
        console.run(verb())
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == "error: BSNS_LOG_FORMAT is 'xml'; give text or json\n"


def test_json_has_the_error_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    status_of(BadOption("no"), as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == {"event": "error", "code": "BadOption", "message": "no"}
    assert said.err == "error: no\n"
    status_of(BadOption("no"), as_json=True, leashed=True)
    assert capsys.readouterr().err == ""


def test_an_error_that_cannot_be_written_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as out, open("/dev/full", "w", buffering=1) as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = status_of(BadOption("no"), as_json=True)
        monkeypatch.undo()
        for stream in (out, err):
            with contextlib.suppress(OSError):
                stream.flush()
    assert status == 2


def test_a_reader_that_left_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(BrokenPipeError()) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_and_clean_up_runs(signum: signal.Signals) -> None:
    done: list[str] = []

    async def verb() -> None:
        try:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signum)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            done.append("cleaned")

    with pytest.raises(typer.Exit) as ended:
        console.run(verb())
    assert ended.value.exit_code == 130
    assert done == ["cleaned"]


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def verb() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.01)

    console.run(verb())


def test_while_importing_a_signal_ends_it_at_once(left: list[int]) -> None:
    async def verb() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the signal")

    with pytest.raises(SystemExit):
        console.run(verb())
    assert left == [130]


def test_a_thread_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    release, left = threading.Event(), list[int]()

    def leave(status: int) -> NoReturn:
        left.append(status)
        release.set()  # as the process would have ended
        raise SystemExit(status)

    async def verb() -> None:
        asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.to_thread(release.wait, 20)

    monkeypatch.setattr(console, "leave", leave)
    started_s = running_s()
    with pytest.raises(SystemExit):
        console.run(verb())
    assert left == [130]
    assert running_s() - started_s < 3


def test_clean_up_is_seen_through_a_second_cancellation() -> None:
    done: list[str] = []

    async def ending() -> None:
        await asyncio.sleep(0.05)
        done.append("cleaned")

    async def main() -> None:
        task = asyncio.ensure_future(console.see_through(ending()))
        for _ in range(3):
            await asyncio.sleep(0.005)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    assert done == ["cleaned"]


def test_seeing_through_passes_errors_on() -> None:
    async def ending() -> None:
        raise BadOption("no")

    with pytest.raises(BadOption):
        asyncio.run(console.see_through(ending()))


def test_reading_in_a_thread() -> None:
    assert asyncio.run(console.from_thread(lambda: "line")) == "line"

    def fail() -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")

    with pytest.raises(UnicodeDecodeError):
        asyncio.run(console.from_thread(fail))


def test_a_spinner_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with console.doing("working") as say:
        say("still", 0.5, line=3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, width=80))
    with console.doing("working [on it]") as say:
        say("converting", 0.5)
        say("node 1 · loading", line=1)
    said = capsys.readouterr()
    assert said.out == ""
    assert "node 1 · loading" in said.err


@pytest.mark.parametrize(
    ("named", "level"),
    [
        ("debug", logging.DEBUG),
        ("Error", logging.ERROR),
        ("nonsense", logging.WARNING),
        ("basic_format", logging.WARNING),
    ],
)
def test_a_level_is_one_of_loggings_or_the_usual(monkeypatch: pytest.MonkeyPatch, named: str, level: int) -> None:
    """BASIC_FORMAT is a name in logging, too, but of no level."""
    taken: list[int] = []
    monkeypatch.setenv("BSNS_LOG", named)
    monkeypatch.setattr(logs.structlog, "configure", lambda **_: None)
    monkeypatch.setattr(logs.structlog, "make_filtering_bound_logger", taken.append)
    logs.log_to_stderr()
    assert taken == [level]


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5 k", 1500), ("7", 7), (None, None)]
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert console.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 apples", "-1", "0", "1..5G", "9" * 400 + "GiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(BadOption):
        console.parse_size(text)
