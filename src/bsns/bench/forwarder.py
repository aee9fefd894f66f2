"""The forwarder of an emulated network: takes IP packets from TUN devices and hands them on late, at a link's rate.

A process of its own, `python -m bsns.bench.forwarder FD…`, the devices in the order of their addresses' last byte, from
1 on. Each line of standard input is a JSON list of [from, to, delay_s, bytes_per_s, loss] that replaces the ways
between two devices from now on; the answer is a line with what was counted so far. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import json
import os
import random
import select
import sys
import time
from collections.abc import Sequence

QUEUE_S = 0.25
"""A packet that would wait longer than this for its turn on a link is dropped, as a router's full queue does."""
MAX_PACKET = 65536
READ_PACKETS = 64
"""Taken from one device at a time, so that no device starves the others."""
PR_SET_TIMERSLACK = 29


class Wire:
    """One direction between two places: a packet takes its turn at `bytes_per_s`, then travels for `delay_s`, if it is
    not one of those that are lost on the way: `loss` of them, at random, and always the same ones.

    A wire of rate 0 is cut: what is sent there is lost, and nobody is told.
    """

    __slots__ = ("_free_s", "_random", "bytes_per_s", "delay_s", "loss")

    def __init__(self, delay_s: float = 0.0, bytes_per_s: float = float("inf"), loss: float = 0.0) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.loss = loss
        self._free_s = 0.0
        self._random = random.Random(0)

    def due_s(self, now_s: float, size: int) -> float | None:
        """When a packet given now arrives; None if the queue before it is full, it is lost, or the wire is cut."""
        if not self.bytes_per_s:
            return None
        begin_s = max(now_s, self._free_s)
        if begin_s - now_s > QUEUE_S:
            return None
        self._free_s = begin_s + size / self.bytes_per_s
        if self.loss and self._random.random() < self.loss:
            return None
        return self._free_s + self.delay_s


class Forwarder:
    """The wires between all places, and the packets on them."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = devices
        self._wires = {(a, b): Wire() for a in range(len(devices)) for b in range(len(devices)) if a != b}
        self._flying: list[tuple[float, int, int, bytes]] = []
        """A heap of (due_s, number, device, packet)."""
        self.packets = 0
        self.dropped = 0
        self._number = 0

    def reshape(self, ways: Sequence[Sequence[float]]) -> None:
        """Replace wires; each entry is (from, to, delay_s, bytes_per_s, loss)."""
        for one, other, *way in ways:
            self._wires[int(one), int(other)] = Wire(*way)

    def take(self, place: int, packet: bytes, now_s: float) -> None:
        """Put a packet on its wire; what is not for a place by IPv4 (RFC 791: address ends at byte 19) is ignored."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        target = packet[19] - 1
        wire = self._wires.get((place, target))
        if wire is None:
            return
        due_s = wire.due_s(now_s, len(packet))
        if due_s is None:
            self.dropped += 1
            return
        self._number += 1
        heapq.heappush(self._flying, (due_s, self._number, self._devices[target], packet))

    def deliver(self, now_s: float) -> float | None:
        """Hand over what is due; how long until the next packet is, or None."""
        while self._flying and self._flying[0][0] <= now_s:
            _, _, device, packet = heapq.heappop(self._flying)
            try:
                os.write(device, packet)
                self.packets += 1
            except OSError:  # the device's queue is full, or its place is going away
                self.dropped += 1
        return self._flying[0][0] - now_s if self._flying else None

    def run(self, commands: int) -> None:
        """Forward until `commands` ends."""
        inputs = [commands, *self._devices]
        places = {device: place for place, device in enumerate(self._devices)}
        while True:
            wait_s = self.deliver(time.monotonic())
            ready, _, _ = select.select(inputs, [], [], wait_s)  # in microseconds; epoll counts milliseconds
            for descriptor in ready:
                if descriptor == commands:
                    if not self._obey(commands):
                        return
                    continue
                with contextlib.suppress(BlockingIOError):
                    for _ in range(READ_PACKETS):
                        packet = os.read(descriptor, MAX_PACKET)
                        self.take(places[descriptor], packet, time.monotonic())

    def _obey(self, commands: int) -> bool:
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(commands, MAX_PACKET)
            if not piece:
                return False
            line += piece
        self.reshape(json.loads(line))
        sys.stdout.write(json.dumps({"packets": self.packets, "dropped": self.dropped}) + "\n")
        sys.stdout.flush()
        return True


def main() -> None:
    """Forward between the devices given as arguments, as punctually as this machine lets us."""
    devices = [int(text) for text in sys.argv[1:]]
    for device in devices:
        os.set_blocking(device, False)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    with contextlib.suppress(OSError):  # a network does not wait for its nodes' processors
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
    Forwarder(devices).run(sys.stdin.fileno())


if __name__ == "__main__":
    main()
