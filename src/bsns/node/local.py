"""A whole swarm of processes on this machine: `bsns up` and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerFailed, PeerTimedOut, error_from_wire
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
        told: Told = lambda number, what: None,
    ) -> None:
        self._model = model
        self._ranges = ranges
        self._arguments = ["--dtype", dtype, "--device", device, "--threads", str(threads)]
        self._threads = threads
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
        return self._processes

    async def __aenter__(self) -> LocalSwarm:
        """Raises the first node's error if one does not come up, and PeerTimedOut; nothing is left running then."""
        try:
            self._peer = await Peer.found(Listen())
            async with asyncio.timeout(START_DEADLINE_S):
                await asyncio.gather(*(self._start(number, blocks) for number, blocks in enumerate(self._ranges)))
        except TimeoutError:
            await self.close()
            raise PeerTimedOut(f"the nodes did not come up within {START_DEADLINE_S:g} s") from None
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ask every node to leave, and kill those that do not within `STOP_DEADLINE_S`."""
        await asyncio.gather(*(_stop(process) for process in self._processes))
        if self._peer is not None:
            await self._peer.close()
            self._peer = None

    async def _start(self, number: int, blocks: BlockRange) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bsns.cli.main", "serve", self._model),
            *("--blocks", str(blocks), "--json", "--leashed", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"BSNS_INVITE": self.peer.invite, "OMP_NUM_THREADS": str(self._threads)},
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        self._processes.append(process)
        assert process.stdout is not None
        while line := await process.stdout.readline():
            event = json.loads(line)
            if event["event"] == "serving":
                self._told(number, "serving")
                return
            if event["event"] == "error":
                raise error_from_wire(event["code"], f"node {number + 1}: {event['message']}")
            self._told(number, event["what"])
        raise PeerFailed(f"node {number + 1} ended with status {await process.wait()} before it served")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
