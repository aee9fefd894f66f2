"""Processes of the `bsns` command, beside this one: forked from the zygote on Linux, elsewhere started anew."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bsns.node.zygote import Forked, zygote

FORKS = sys.platform == "linux"


class Process(Protocol):
    """What an asyncio.subprocess.Process is, as far as it is needed."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdout(self) -> asyncio.StreamReader | None: ...
    async def wait(self) -> int: ...
    def send_signal(self, signum: int, /) -> None: ...


def prepare() -> None:
    """Have libraries loaded for the processes to come, while this one goes on."""
    if FORKS:
        zygote()


async def start(
    verb: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    network: Path | None = None,
    *,
    leashed: bool = True,
) -> Process:
    """Run a verb of `bsns` with these words, its standard output piped to us.

    `network`: the file of the network namespace that it shall be in, if not ours. `leashed`: the verb knows whose it
    is, and ends with us wherever that can be. Raises PeerFailed.
    """
    leash = ("--leashed", "0" if FORKS else str(os.getpid())) if leashed else ()
    if FORKS:
        return await _ForkedProcess.start((verb, *leash, *words), environment, network)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bsns.cli.main", verb, *leash, *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is ours to pass on
    )


class _ForkedProcess:
    """A process of the zygote's, for an event loop."""

    def __init__(self, forked: Forked, stdout: asyncio.StreamReader) -> None:
        self.pid = forked.pid
        self.stdout = stdout
        self._forked = forked
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(forked.fileno(), self._end)

    @classmethod
    async def start(cls, words: Sequence[str], environment: Mapping[str, str], network: Path | None) -> _ForkedProcess:
        read, write = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        try:
            connection = zygote().ask(words, environment, (nothing, write, 2), network)
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
            os.close(nothing)
        stdout = asyncio.StreamReader()
        pipe = os.fdopen(read, "rb", 0)
        loop = asyncio.get_running_loop()
        output, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdout), pipe)
        try:
            return cls(await Forked.beginning(connection), stdout)
        except BaseException:
            output.close()
            raise

    @property
    def returncode(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def send_signal(self, signum: int, /) -> None:
        if self.returncode is None:
            self._forked.send_signal(signum)

    def _end(self) -> None:
        self._loop.remove_reader(self._forked.fileno())
        status = self._forked.wait()
        self._ended.set_result(status if status is not None else -signal.SIGKILL)
