"""The simulated network: ways with a delay, a bandwidth and losses, and groups of peers that are cut off."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bsns.core.ids import PeerId
from bsns.protocol.frames import PREFIX
from bsns.simulator.clock import Process, VirtualLoop
from bsns.simulator.model import ROW_BYTES
from bsns.transport.memory import MemoryNetwork, Pipe


@dataclass(frozen=True, slots=True)
class Way:
    """A way between two peers, the same in both directions."""

    round_trip_s: float
    bytes_per_s: float
    loss: float = 0.0
    """The share of frames that are lost and sent again, which takes another round trip and `RESEND_S`."""


RESEND_S = 0.2
"""The least time after which TCP sends again (RFC 6298 allows a second; Linux waits 200 ms)."""


class SimulatedNetwork(MemoryNetwork):
    """A MemoryNetwork whose bytes take time."""

    def __init__(
        self, loop: VirtualLoop, way: Callable[[PeerId, PeerId], Way], row_bytes: int, rng: random.Random
    ) -> None:
        """`way` joins two peers; `row_bytes` is what a token's activations take on a real network."""
        super().__init__()
        self._loop = loop
        self._way = way
        self._scale = row_bytes / ROW_BYTES
        self._rng = rng
        self._group: dict[PeerId, int] = {}
        self._free_s: dict[Pipe, float] = {}
        self.processes: dict[PeerId, Process] = {}
        """Of peers that share their machine, and hear nothing while they wait for a core."""
        self.bytes = 0
        self.frames = 0
        self.lost = 0

    def carry(self, pipe: Pipe, data: bytes) -> None:
        way = self._way(pipe.sender, pipe.receiver)
        size = len(data)
        if size >= PREFIX.size:
            size += int(PREFIX.unpack_from(data)[1] * (self._scale - 1))
        self.bytes += size
        self.frames += 1
        begins_s = max(self._loop.time(), self._free_s.get(pipe, 0.0))
        self._free_s[pipe] = sent_s = begins_s + size / way.bytes_per_s
        if way.loss and self._rng.random() < way.loss:
            self.lost += 1
            self._free_s[pipe] = sent_s = sent_s + RESEND_S + way.round_trip_s
        arrive = partial(pipe.arrive, data)
        process = self.processes.get(pipe.receiver)
        if process is not None:
            arrive = partial(process.hear, arrive)
        self._loop.call_at(sent_s + way.round_trip_s / 2, arrive)

    def underway(self, pipe: Pipe) -> int:
        """What has not left the sender yet, as on the real network it would count."""
        left_s = self._free_s.get(pipe, 0.0) - self._loop.time()
        return math.ceil(left_s * self._way(pipe.sender, pipe.receiver).bytes_per_s / self._scale) if left_s > 0 else 0

    def carry_end(self, pipe: Pipe, lost: bool) -> None:
        delay_s = self._way(pipe.sender, pipe.receiver).round_trip_s / 2
        self._loop.call_at(max(self._loop.time(), self._free_s.pop(pipe, 0.0)) + delay_s, pipe.end, lost)

    async def dialled(self, source: PeerId, target: PeerId) -> None:
        await asyncio.sleep(1.5 * self._way(source, target).round_trip_s)

    def part(self, peers: set[PeerId], group: int) -> None:
        """Put peers in a group that hears nothing of the others; group 0 is where everybody is at first."""
        self._group.update(dict.fromkeys(peers, group))
        self.resume()

    def group_of(self, peer: PeerId) -> int:
        return self._group.get(peer, 0)

    def is_frozen(self, peer: PeerId) -> bool:
        return peer in self._frozen

    def is_silent(self, ends: frozenset[PeerId]) -> bool:
        if super().is_silent(ends):
            return True
        if not self._group:
            return False
        groups = {self._group.get(peer, 0) for peer in ends}
        return len(groups) > 1
