"""Which codec activations take on each way of a client's routes."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Final

from bsns.compression.rows import decode, encode
from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.node.prober import Prober
from bsns.node.view import View
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.records import NodeRecord
from bsns.transport.clock import Clock
from bsns.transport.port import Dial

AUTO: Final = "auto"
NONE: Final = "none"
WIRES: Final = (AUTO, NONE, *(name for name in CODECS if name != RAW))
"""What a user may ask for."""
SHORT: Final = "int8-rot"
"""What `auto` takes in place of 16-bit numbers where that is faster: as short as int8, and real activations come
back off by a third as much (docs/decisions/0011-wire-codecs.md)."""
GAIN = 0.9
"""It has to take no more of the time than this: otherwise the numbers stay as they are."""
FAR_S = 0.002
"""A node is far whose round trip is longer: the way to it is taken for a slow one until it has been measured."""
TRIES = 20


def check_wire(wire: str) -> None:
    """Raises BadOption for a codec nobody knows."""
    if wire not in WIRES:
        raise BadOption(f"there is no wire codec {wire!r}; use one of {', '.join(WIRES)}")


class Wires:
    """Chooses codecs (client.finding.ChooseCodec) for activations of one model in one dtype.

    `auto` leaves float32 as it is: whoever computes in it wants it exact.
    """

    def __init__(
        self, wire: str, view: View, own: PeerId, dial: Dial, clock: Clock, *, dtype: str, columns: int
    ) -> None:
        """`own` measures its ways to the ends of the routes it uses, while `run` runs. Raises BadOption."""
        check_wire(wire)
        as_it_is = wire == NONE or (wire, dtype) in ((AUTO, "float32"), ("bf16", "bfloat16"))
        self._codec = RAW if as_it_is else wire
        self._view = view
        self._dtype = dtype
        self._columns = columns
        self._ends: set[PeerId] = set()
        self._prober = Prober(own, dial, self._ends_here, clock=clock)

    def choose(self, sender: PeerId | None, receiver: PeerId | None) -> str:
        """The codec of what one peer sends another; None is ourselves."""
        if self._codec != AUTO:
            return self._codec
        bytes_per_s = self._bytes_per_s(sender, receiver)
        if bytes_per_s is None:
            return RAW
        raw, short = (CODECS[name].row_bytes(self._columns, self._dtype) for name in (RAW, SHORT))
        cost = row_cost_s(SHORT, self._dtype, self._columns) * bytes_per_s
        return SHORT if short + cost < GAIN * raw else RAW

    async def run(self) -> None:
        """Measure until cancelled, if it matters."""
        if self._codec == AUTO:
            await self._prober.run()

    def _bytes_per_s(self, sender: PeerId | None, receiver: PeerId | None) -> float | None:
        """As whoever sends has measured it, or else whoever receives; None where nobody has, and it seems short."""
        if sender is not None and receiver is not None:
            return self._view.bytes_per_s(sender, receiver)
        peer = sender or receiver
        assert peer is not None
        self._ends.add(peer)
        for link in self._prober.links():
            if link.peer == peer and math.isfinite(link.bytes_per_s):
                return link.bytes_per_s
        round_trip_s = self._view.round_trip_s(peer)
        return 0.0 if round_trip_s is not None and round_trip_s > FAR_S else None

    async def _ends_here(self) -> Sequence[NodeRecord]:
        """As they were last read: who asks for no route needs no news."""
        return [record for record in self._view.last_read() if record.peer in self._ends]


@functools.cache
def row_cost_s(codec: str, dtype: str, columns: int) -> float:
    """What encoding a row and decoding it takes on this machine, at best."""
    data = bytes(CODECS[RAW].row_bytes(columns, dtype))
    times_s = []
    for _ in range(TRIES):
        started_s = time.perf_counter()
        decode(codec, encode(codec, data, dtype, columns), dtype, columns)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)
