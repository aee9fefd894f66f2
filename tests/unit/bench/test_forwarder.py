"""What the forwarder of an emulated network does with packets: when they arrive, which go where, which are dropped."""

from __future__ import annotations

import math
import os
import select
import threading
from collections.abc import Iterator

import pytest

from bsns.bench.forwarder import QUEUE_S, Forwarder, Wire


def packet(target: int, size: int = 100, mark: int = 0) -> bytes:
    """An IPv4 packet to the place with this number."""
    header = bytearray(20)
    header[0], header[16:20] = 0x45, bytes((10, 77, 0, target + 1))
    return bytes(header) + bytes([mark]) * (size - 20)


def test_a_wire_without_load_delays() -> None:
    assert Wire(0.0025).due_s(10.0, 1500) == pytest.approx(10.0025)


def test_packets_take_turns_at_the_rate() -> None:
    wire = Wire(0.5, 1000.0)
    assert [wire.due_s(10.0, 100) for _ in range(3)] == pytest.approx([10.6, 10.7, 10.8])
    assert wire.due_s(12.0, 100) == pytest.approx(12.6)  # the queue has long been empty


def test_a_full_queue_drops_and_recovers() -> None:
    wire = Wire(0.0, 1000.0)
    fates = [wire.due_s(0.0, 100) for _ in range(10)]
    taken = [due_s for due_s in fates if due_s is not None]
    assert len(taken) == math.floor(QUEUE_S / 0.1) + 1
    assert fates[len(taken) :] == [None] * (10 - len(taken))
    assert wire.due_s(1.0, 100) == pytest.approx(1.1)


def test_a_lossy_wire_loses_its_share_and_the_same_ones_each_time() -> None:
    wires = Wire(0.5, 1e6, 0.1), Wire(0.5, 1e6, 0.1)
    fates, again = [[wire.due_s(float(at), 100) is None for at in range(5000)] for wire in wires]
    assert fates == again
    assert sum(fates) == pytest.approx(500, abs=80)


class Ends:
    """Three devices stood for by socket pairs: what is forwarded can be read at the other ends."""

    def __init__(self) -> None:
        self.pairs = [os.pipe() for _ in range(3)]
        self.forwarder = Forwarder([write for _, write in self.pairs])

    def arrived(self, place: int) -> bytes:
        reader = self.pairs[place][0]
        return os.read(reader, 65536) if select.select([reader], [], [], 0)[0] else b""

    def close(self) -> None:
        for pair in self.pairs:
            for end in pair:
                os.close(end)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_packets_arrive_at_their_place_when_due(ends: Ends) -> None:
    ends.forwarder.reshape([[0, 1, 0.010, math.inf], [0, 2, 0.002, math.inf]])
    ends.forwarder.take(0, packet(1, mark=1), 5.0)
    ends.forwarder.take(0, packet(2, mark=2), 5.0)
    assert ends.forwarder.deliver(5.001) == pytest.approx(0.001)
    assert (ends.arrived(1), ends.arrived(2)) == (b"", b"")
    assert ends.forwarder.deliver(5.003) == pytest.approx(0.007)
    assert (ends.arrived(1), ends.arrived(2)) == (b"", packet(2, mark=2))
    assert ends.forwarder.deliver(5.011) is None
    assert ends.arrived(1) == packet(1, mark=1)
    assert (ends.forwarder.packets, ends.forwarder.dropped) == (2, 0)


@pytest.mark.parametrize(
    "stray", [b"", bytes(19), b"\x60" + bytes(60), packet(0), packet(9), packet(254)], ids=lambda value: str(len(value))
)
def test_what_is_for_nobody_goes_nowhere(ends: Ends, stray: bytes) -> None:
    ends.forwarder.take(0, stray, 5.0)
    assert ends.forwarder.deliver(9.0) is None
    assert [ends.arrived(place) for place in range(3)] == [b"", b"", b""]


def test_it_answers_commands_and_ends_with_them(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    thread = threading.Thread(target=ends.forwarder.run, args=(reader,), daemon=True)
    os.write(writer, b"[[0, 1, 0.25, Infinity]]\n")
    os.close(writer)
    thread.start()
    thread.join(10.0)
    os.close(reader)
    assert not thread.is_alive()
    assert capsys.readouterr().out == '{"packets": 0, "dropped": 0}\n'
    ends.forwarder.take(0, packet(1), 5.0)
    assert ends.forwarder.deliver(5.0) == pytest.approx(0.25)
