"""A whole swarm of processes on this machine: `bsns up` and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, PeerFailed, PeerTimedOut, error_from_wire
from bsns.core.ids import PeerId
from bsns.node.peer import Listen, Peer
from bsns.node.processes import Process, start

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 4.0
LEAVE_DEADLINE_S = 12.0
"""What a node that is let go may take: it serves its sessions until they have gone elsewhere."""
AGAIN_S = 60.0
"""A node that was started again and ends within this time is not started once more."""

Told = Callable[[int, str], None]
"""Is told which node (by number) is doing what."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where in this machine's networks a process lives: the address it listens on, and the file of its namespace, if
    that is not ours; and what its environment has beside ours."""

    host: str = "127.0.0.1"
    network: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    """One node: what it is to be, and, once it serves, who it is and how others join through it."""

    blocks: BlockRange
    words: tuple[str, ...]
    home: Home
    process: Process
    id: PeerId | None = None
    invite: str | None = None
    metrics: str | None = None
    """Where Prometheus reads its metrics."""
    let_go: bool = False


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
        executor: str = "auto",
        quant: str = "none",
        kv: str = "none",
        movable: bool = False,
        metrics: bool = False,
        homes: Sequence[Home] = (),
        own_home: Home | None = None,
        founder: Sequence[str] | None = None,
        told: Told = lambda number, what: None,
    ) -> None:
        """`movable` nodes begin with their ranges and go where the orchestrator plans them; others stay.

        A movable node may be given hardly more than its share of the blocks, so that the swarm stays one of many nodes:
        they are processes of one machine, and whatever a planner thinks, all of them together are no faster than it.

        `metrics`: whether Prometheus may read each node's, on a free port of this machine only.

        `founder`: words of `bsns serve` for a process of its own that founds the swarm, as the first node; otherwise
        this process does. `homes`: of the nodes, where they do not live beside us; `own_home`: ours.
        """
        self._model = model
        self._ranges = ranges
        self._arguments = ["--dtype", dtype, "--device", device, "--threads", str(threads)]
        self._arguments += ["--executor", executor, "--quant", quant, "--kv", kv]
        if metrics:
            self._arguments += ["--metrics", "127.0.0.1:0"]
        self._threads = threads
        self._movable = movable
        self._homes = homes
        self._own_home = own_home or Home()
        self._founder = founder
        self._told = told
        self._nodes: list[_Node] = []
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer:
        """This process's member of the swarm: its founder, where no other process is."""
        if self._peer is None:
            raise RuntimeError("use `async with LocalSwarm(…)`")
        return self._peer

    @property
    def processes(self) -> list[Process]:
        """The nodes' processes: the founder's, if it has its own; in the order of the ranges; those that were added."""
        return [node.process for node in self._nodes]

    def members(self) -> dict[PeerId, int]:
        """The numbers of the nodes that are to be there, by who they are."""
        return {node.id: number for number, node in enumerate(self._nodes) if node.id is not None and not node.let_go}

    def blocks(self, number: int) -> BlockRange:
        """What a node began with."""
        return self._nodes[number].blocks

    def metrics(self) -> list[str]:
        """Where Prometheus reads the nodes' metrics."""
        return [node.metrics for node in self._nodes if node.metrics is not None and not node.let_go]

    def invite_of(self, number: int) -> str:
        """The invite by which others join through this node."""
        invite = self._nodes[number].invite
        if invite is None:
            raise RuntimeError(f"node {number + 1} does not serve")
        return invite

    async def __aenter__(self) -> LocalSwarm:
        """Raises the first node's error if one does not come up, and PeerTimedOut; nothing is left running then."""
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await self._start()
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

    async def lost(self) -> tuple[int, BsnsError]:
        """Wait until a node's process ends that nobody asked to end; its number, and the error that says which."""
        waits = [asyncio.ensure_future(node.process.wait()) for node in self._nodes if not node.let_go]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        number, node = next(
            (n, node) for n, node in enumerate(self._nodes) if node.process.returncode is not None and not node.let_go
        )
        how = _how(node.process.returncode)
        return number, PeerFailed(f"node {number + 1} {how}; nobody holds blocks {node.blocks} now")

    async def mend(self, told: Callable[[str], None]) -> BsnsError:
        """Start every node again whose process ends unasked, until one does not come up, or ends again within
        `AGAIN_S`; the error that says so. `told` gets a line for each loss and each return."""
        back_s: dict[int, float] = {}
        while True:
            number, error = await self.lost()
            if time.monotonic() - back_s.get(number, -math.inf) < AGAIN_S:
                return PeerFailed(f"{error.message}, soon after it was started")
            told(f"{error.message}; starting it again")
            try:
                await self.restart(number)
            except BsnsError as failed:
                return failed
            except TimeoutError:
                return PeerTimedOut(f"node {number + 1} did not come up again within {START_DEADLINE_S:g} s")
            back_s[number] = time.monotonic()
            told(f"node {number + 1} serves again")

    async def restart(self, number: int) -> None:
        """Start a node again whose process has ended or is to end now. Raises as entering the context does."""
        node = self._nodes[number]
        await _stop(node.process)
        node.id = node.invite = None
        self._told(number, f"blocks {node.blocks}: starting")
        node.process = await self._spawn(node.words, node.home, self.peer.invite)
        node.let_go = False
        async with asyncio.timeout(START_DEADLINE_S):
            await self._until_serving(number)

    async def add(
        self, blocks: BlockRange, words: Sequence[str] | None = None, *, home: Home | None = None, invite: str = ""
    ) -> int:
        """Start one more node, for this range (or as further words of `bsns serve` say), and wait until it serves; its
        number. It joins by our invite, or another's. Raises as entering the context does."""
        words = tuple(words) if words is not None else self._place(blocks)
        number = await self._begin(blocks, words, home or Home(), invite or self.peer.invite)
        async with asyncio.timeout(START_DEADLINE_S):
            await self._until_serving(number)
        return number

    async def let_go(self, number: int, signum: signal.Signals = signal.SIGTERM) -> None:
        """End a node for good, or until it is started again; returns when its process has ended. Its number stays."""
        node = self._nodes[number]
        node.let_go = True
        with contextlib.suppress(TimeoutError, ProcessLookupError):
            async with asyncio.timeout(LEAVE_DEADLINE_S):
                node.process.send_signal(signum)
                await node.process.wait()
        await _stop(node.process)

    async def close(self) -> None:
        """Ask every node to leave, and kill those that do not within `STOP_DEADLINE_S`."""
        await asyncio.gather(*(_stop(node.process) for node in self._nodes))
        if self._peer is not None:
            await self._peer.close()
            self._peer = None

    async def _start(self) -> None:
        listen = Listen(self._own_home.host)
        if self._founder is None:
            self._peer = await Peer.found(listen)
        else:
            await self._begin(BlockRange(0, 1), tuple(self._founder), self._home(0), None)
            await self._until_serving(0)
            self._peer = await Peer.join(self.invite_of(0), listen)
        first = len(self._nodes)
        for number, blocks in enumerate(self._ranges, first):
            await self._begin(blocks, self._place(blocks), self._home(number), self._peer.invite)
        await _all(self._until_serving(number) for number in range(first, len(self._nodes)))

    def _home(self, number: int) -> Home:
        return self._homes[number] if self._homes else Home()

    async def _begin(self, blocks: BlockRange, words: tuple[str, ...], home: Home, invite: str | None) -> int:
        node = _Node(blocks, words, home, await self._spawn(words, home, invite))
        number = len(self._nodes)  # now: others may have been added meanwhile
        self._nodes.append(node)
        self._told(number, f"blocks {blocks}: starting")
        return number

    async def _spawn(self, words: Sequence[str], home: Home, invite: str | None) -> Process:
        own = {"BSNS_INVITE": invite or "", "OMP_NUM_THREADS": str(self._threads)}
        words = ("--json", "--host", home.host, *self._arguments, *words, "--", self._model)
        return await start("serve", words, {**os.environ, **own, **home.environment}, home.network)

    def _place(self, blocks: BlockRange) -> tuple[str, ...]:
        if not self._movable:
            return "--blocks", str(blocks)
        return "--first-blocks", str(blocks), "--most-blocks", str(max(map(len, self._ranges)) + 1)

    async def _until_serving(self, number: int) -> None:
        node, name = self._nodes[number], f"node {number + 1}"
        assert node.process.stdout is not None
        while line := await node.process.stdout.readline():
            match _event(line):
                case {"event": "serving", "id": str(peer), "invite": str(invite)} as said:
                    node.id, node.invite, node.metrics = PeerId(peer), invite, said.get("metrics")
                    self._told(number, f"blocks {node.blocks}: serving")
                    return
                case {"event": "error", "code": str(code), "message": str(message)}:
                    raise error_from_wire(code, f"{name}: {message}")
                case {"event": "progress", "what": str(what)}:
                    self._told(number, f"blocks {node.blocks}: {what}")
                case _:
                    continue  # a library's own words
        raise PeerFailed(f"{name} {_how(await node.process.wait())} before it served")


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


async def _stop(process: Process) -> None:
    if process.returncode is None:
        await _end(process)
    if process.stdout is not None:  # read to its end, so that the pipe is closed before the event loop is
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.stdout.read()


async def _end(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()
