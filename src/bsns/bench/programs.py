"""Others' programs as processes of ours: started, waited for until they serve, and ended whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bsns.core.errors import BadOption

_POLL_S = 0.2
_LAST_WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Program:
    """One process, with what it says in files."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    errors: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    async def until(self, ready: Callable[[], Awaitable[bool]], deadline_s: float) -> None:
        """Wait until it is. Raises BadOption, with its last words, if it ends before or is not ready in time."""
        try:
            async with asyncio.timeout(deadline_s):
                while not await ready():
                    if self.process.returncode is not None:
                        raise BadOption(f"{self.name} ended with status {self.process.returncode}: {self._last()}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise BadOption(f"{self.name} was not ready within {deadline_s:g} s: {self._last()}") from None

    async def output(self, deadline_s: float) -> str:
        """What it said, once it has ended. Raises BadOption if it fails, or does not end."""
        try:
            async with asyncio.timeout(deadline_s):
                status = await self.process.wait()
        except TimeoutError:
            raise BadOption(f"{self.name} did not end within {deadline_s:g} s: {self._last()}") from None
        if status:
            raise BadOption(f"{self.name} ended with status {status}: {self._last()}")
        return self.said

    def _last(self) -> str:
        lines = self.errors.read_text(errors="replace")[-_LAST_WORDS_BYTES:].split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, errors: Path | None = None
) -> AsyncIterator[Program]:
    """The program, until the context is left; then it and all that it started are killed.

    Errors go where the rest goes, unless a file is named for them. Raises BadOption if it cannot be started.
    """
    name, errors = Path(command[0]).name, errors or log
    # where it is at hand: not even our own being killed leaves anything running
    leash = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
    try:
        with log.open("wb") as output, errors.open("ab") as errors_output:
            process = await asyncio.create_subprocess_exec(
                *leash,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT if errors == log else errors_output,
                env=dict(environment),  # uvloop takes nothing else
                start_new_session=True,
            )
    except OSError as error:
        raise BadOption(f"{command[0]} cannot be started ({error.strerror})") from error
    try:
        yield Program(name, process, log, errors)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def free_port() -> int:
    """A port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of the loopback device."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
