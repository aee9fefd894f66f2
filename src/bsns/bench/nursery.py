"""The nursery: nodes of an emulated swarm, forked from one process that has loaded the libraries.

They are `bsns serve` as users run it, each a process of its own in its own place of the network. Loading torch takes
some 3 s of a core: a bench that starts a hundred nodes on two would spend its time with that, and nodes that calibrate
while others load find themselves slow. So they are forked, a few at a time.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import structlog

from bsns.bench.emulation import Network, enter, go_first
from bsns.core.errors import PeerError, PeerFailed, PeerTimedOut, error_from_wire
from bsns.node.peer import Listen, Peer

log = structlog.get_logger(__name__)

START_DEADLINE_S = 90.0
"""For one node; the first waits for the libraries."""
STOP_DEADLINE_S = 5.0
AT_ONCE = 2
"""Nodes that start at the same time, of which each shall have a core."""
COMMAND = "bsns.cli.main"
LIBRARIES = (__name__, COMMAND, "bsns.node.server", "bsns.transport.libp2p", "bsns.swarm.hivemind_directory")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(LIBRARIES))


def open_nursery() -> None:
    """Begin to load the libraries. Whatever this process becomes later, in scheduling and place, nodes begin as it is
    now."""
    forkserver.ensure_running()


@dataclass(frozen=True, slots=True)
class Born:
    """One node to be: its place in the network, the words after `bsns serve`, its environment beside ours."""

    place: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class EmulatedSwarm:
    """A swarm founded here, in the place this thread is in, and its nodes. Leaving the context ends every process."""

    def __init__(self, network: Network, host: str, nodes: Sequence[Born]) -> None:
        self._network = network
        self._host = host
        self._nodes = nodes
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._peer: Peer | None = None
        self._closed = False

    @property
    def peer(self) -> Peer:
        """The founder, in this process."""
        if self._peer is None:
            raise RuntimeError("use `async with EmulatedSwarm(…)`")
        return self._peer

    async def __aenter__(self) -> EmulatedSwarm:
        """Raises the first node's error if one does not come up, and PeerTimedOut; nothing is left running then."""
        try:
            self._peer = await Peer.found(Listen(self._host))
            for first in range(0, len(self._nodes), AT_ONCE):
                await asyncio.gather(*(self._bear(node) for node in self._nodes[first : first + AT_ONCE]))
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
        self._closed = True
        for process in self._processes:
            process.terminate()
        await asyncio.gather(*(asyncio.to_thread(_end, process) for process in self._processes))
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._peer is not None:
            await self._peer.close()
            self._peer = None

    async def _bear(self, node: Born) -> None:
        """Start a node; once more, as its owner would, if it met nobody in time: that happens on a busy machine."""
        try:
            await asyncio.to_thread(_until_serving, *self._fork(node))
        except PeerError as error:
            if self._closed:
                raise
            log.warning("starting a node again", place=node.place, reason=error.message)
            await asyncio.to_thread(_until_serving, *self._fork(node))

    def _fork(self, node: Born) -> tuple[str, BaseProcess, Connection]:
        ours, theirs = _context.Pipe(duplex=False)
        self._pipes.append(ours)
        environment = {**node.environment, "BSNS_INVITE": self.peer.invite}
        arguments = (self._network.namespace(node.place), node.arguments, environment, theirs)
        process = _context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        self._processes.append(process)
        theirs.close()
        return f"node {node.place}", process, ours


def _serve(namespace: str, arguments: Sequence[str], environment: Mapping[str, str], pipe: Connection) -> None:
    """The life of a node, in the forked process: `bsns serve`, its JSON lines into the pipe."""
    os.setsid()  # Ctrl-C is the bench's to pass on
    os.environ.update(environment)
    os.dup2(pipe.fileno(), sys.stdout.fileno())
    enter(namespace)
    go_first()
    sys.argv = ["bsns", "serve", "--json", "--leashed", str(os.getppid()), *arguments]
    importlib.import_module(COMMAND).main()  # by its name, as one starts a command: a bench knows no verbs


def _until_serving(name: str, process: BaseProcess, pipe: Connection) -> None:
    give_up_s = time.monotonic() + START_DEADLINE_S
    pending = b""
    while True:
        if not pipe.poll(max(0.0, give_up_s - time.monotonic())):
            raise PeerTimedOut(f"{name} did not come up within {START_DEADLINE_S:g} s")
        piece = os.read(pipe.fileno(), 65536)
        if not piece:
            process.join(STOP_DEADLINE_S)
            raise PeerFailed(f"{name} ended with status {process.exitcode} before it served")
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            match _event(line):
                case {"event": "serving"}:
                    return
                case {"event": "error", "code": str(code), "message": str(message)}:
                    raise error_from_wire(code, f"{name}: {message}")
                case _:
                    continue


def _event(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _end(process: BaseProcess) -> None:
    process.join(STOP_DEADLINE_S)
    if process.is_alive():
        process.kill()
        process.join()
