"""Faults: what a benchmark does to a node of a local swarm, and how it undoes that."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress

from bsns.bench.emulation import Network
from bsns.node.local import Home, LocalSwarm

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "slow": signal.SIGUSR1,
    "garbage": signal.SIGUSR2,
    "leave": signal.SIGTERM,
}
"""Those of a slow node and of one that sends garbage are for nodes that heed them: see worker.faults."""
UNDO = {"stop": signal.SIGCONT, "slow": signal.SIGUSR1, "garbage": signal.SIGUSR2}
CUT = "cut"
"""Not a signal: the node's network loses what it sends and what it is sent, without a reset."""
MEND_S = 3.0
"""TCP sends again what was lost after about as long as it has been in vain."""
CLIENT = 0
"""The place of whoever runs the benchmark, in an emulated network; node n is in place n + 1."""


def homes(network: Network, nodes: int) -> list[Home]:
    """Where the nodes of a swarm live in an emulated network, each in a place of its own."""
    return [Home(network.address(place), network.file(place)) for place in range(1, nodes + 1)]


class Faults:
    """What can be done to the nodes of a swarm: what signals do, and where there is an emulated network, a cut."""

    def __init__(self, swarm: LocalSwarm, network: Network | None = None) -> None:
        self._swarm = swarm
        self._network = network

    def strike(self, fault: str, number: int) -> None:
        """Do it to the node of this number, now."""
        if fault == CUT:
            if self._network is None:
                raise RuntimeError("only in an emulated network a node can be cut off")
            self._network.cut(number + 1)
        else:
            self._swarm.processes[number].send_signal(SIGNALS[fault])

    async def undo(self, fault: str, numbers: Sequence[int]) -> None:
        """Have the nodes as they were, those that have ended started again."""
        for number in numbers:
            if fault == CUT and self._network is not None:
                self._network.mend(number + 1)
                await asyncio.sleep(MEND_S)
            elif fault in UNDO:
                with suppress(ProcessLookupError):
                    self._swarm.processes[number].send_signal(UNDO[fault])
        if fault != CUT and fault not in UNDO:
            await asyncio.gather(*(self._swarm.restart(number) for number in numbers))
