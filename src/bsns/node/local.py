"""A whole swarm of processes on this machine: `bsns up` and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, PeerFailed, PeerTimedOut, error_from_wire
from bsns.node.peer import Listen, Peer

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 4.0

Told = Callable[[int, str], None]
"""Is told which node (by number) is doing what."""


class LocalSwarm:
    """One process per range, all members of a swarm founded here. Leaving the context ends every process."""

    def __init__(
        self,
        model: str,
        ranges: Sequence[BlockRange],
        *,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 1,
        movable: bool = False,
        told: Told = lambda number, what: None,
    ) -> None:
        """`movable` nodes begin with their ranges and go where the orchestrator plans them; others stay.

        A movable node may be given hardly more than its share of the blocks, so that the swarm stays one of many nodes:
        they are processes of one machine, and whatever a planner thinks, all of them together are no faster than it.
        """
        self._model = model
        self._ranges = ranges
        self._arguments = ["--dtype", dtype, "--device", device, "--threads", str(threads)]
        self._threads = threads
        self._movable = movable
        self._told = told
        self._processes: list[asyncio.subprocess.Process] = []
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer:
        """The founder, in this process."""
        if self._peer is None:
            raise RuntimeError("use `async with LocalSwarm(…)`")
        return self._peer

    @property
    def processes(self) -> list[asyncio.subprocess.Process]:
        """The nodes' processes, in the order of the ranges."""
        return self._processes

    async def __aenter__(self) -> LocalSwarm:
        """Raises the first node's error if one does not come up, and PeerTimedOut; nothing is left running then."""
        try:
            self._peer = await Peer.found(Listen())
            async with asyncio.timeout(START_DEADLINE_S):
                for number, blocks in enumerate(self._ranges):
                    self._processes.append(await self._spawn(number, blocks))
                await _all(self._until_serving(number) for number in range(len(self._processes)))
        except TimeoutError:
            await self.close()
            raise PeerTimedOut(
                f"the nodes did not come up within {START_DEADLINE_S:g} s; try fewer, or a smaller model"
            ) from None
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def lost(self) -> BsnsError:
        """Wait until a node's process ends that nobody asked to end; the error that says which."""
        waits = [asyncio.ensure_future(process.wait()) for process in self._processes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        number = next(n for n, process in enumerate(self._processes) if process.returncode is not None)
        how = _how(self._processes[number].returncode)
        return PeerFailed(f"node {number + 1} {how}; nobody holds blocks {self._ranges[number]} now")

    async def restart(self, number: int) -> None:
        """Start a node again whose process has ended or is to end now. Raises as entering the context does."""
        await _stop(self._processes[number])
        self._processes[number] = await self._spawn(number, self._ranges[number])
        async with asyncio.timeout(START_DEADLINE_S):
            await self._until_serving(number)

    async def close(self) -> None:
        """Ask every node to leave, and kill those that do not within `STOP_DEADLINE_S`."""
        await asyncio.gather(*(_stop(process) for process in self._processes))
        if self._peer is not None:
            await self._peer.close()
            self._peer = None

    async def _spawn(self, number: int, blocks: BlockRange) -> asyncio.subprocess.Process:
        self._told(number, f"blocks {blocks}: starting")
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bsns.cli.main", "serve"),
            *("--json", "--leashed", str(os.getpid()), *self._arguments, *self._place(blocks), "--", self._model),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"BSNS_INVITE": self.peer.invite, "OMP_NUM_THREADS": str(self._threads)},
            start_new_session=True,  # Ctrl-C is ours to pass on
        )

    def _place(self, blocks: BlockRange) -> list[str]:
        if not self._movable:
            return ["--blocks", str(blocks)]
        return ["--first-blocks", str(blocks), "--most-blocks", str(max(map(len, self._ranges)) + 1)]

    async def _until_serving(self, number: int) -> None:
        process, name = self._processes[number], f"node {number + 1}"
        assert process.stdout is not None
        while line := await process.stdout.readline():
            match _event(line):
                case {"event": "serving"}:
                    self._told(number, f"blocks {self._ranges[number]}: serving")
                    return
                case {"event": "error", "code": str(code), "message": str(message)}:
                    raise error_from_wire(code, f"{name}: {message}")
                case {"event": "progress", "what": str(what)}:
                    self._told(number, f"blocks {self._ranges[number]}: {what}")
                case _:
                    continue  # a library's own words
        raise PeerFailed(f"{name} {_how(await process.wait())} before it served")


async def _all(starting: Any) -> None:
    """All of them, or the first error; those that run still are cancelled then, and have ended."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in starting]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _event(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _how(status: int | None) -> str:
    """How a process ended, in words."""
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
            return f"was ended by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
    return f"ended with status {status}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        await _end(process)
    if process.stdout is not None:  # read to its end, so that the pipe is closed before the event loop is
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.stdout.read()


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
