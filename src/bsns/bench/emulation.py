"""An emulated network on this machine: places with an address each, and ways between them with a delay and a rate.

A place is a Linux network namespace with a TUN device; what a process in it sends comes out at the forwarder
(bench.forwarder), which hands it on after the way's delay, at its rate, or loses it. Needs root. Names carry our
process id, so that whoever comes later can remove what a process that was killed has left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bsns.core.errors import BadOption, PeerFailed
from bsns.node.zygote import set_network

TUN = "/dev/net/tun"
NAMESPACES = Path("/run/netns")
MTU = 9000
"""Jumbo frames, for the forwarder's sake: it takes about 40 µs for a packet of whatever size."""
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ECHO = 64
RECEIVE = 1 << 16

_NAME = re.compile(r"bsns-(\d+)-\d+")


@dataclass(frozen=True, slots=True)
class Way:
    """One direction between two places; of rate 0 where it is cut, and swallows what is sent."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    loss: float = 0.0
    """The share of packets that do not arrive, at random."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the forwarder has done so far."""

    packets: int
    dropped: int


def hindrance() -> str | None:
    """Why this process cannot emulate a network here, or None."""
    if sys.platform != "linux":
        return "an emulated network needs Linux"
    if os.geteuid() != 0:
        return "an emulated network needs root, for network namespaces; use sudo"
    if shutil.which("ip") is None:
        return "an emulated network needs the command ip; install iproute2"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"an emulated network needs {TUN}; load the kernel's module tun"
    return None


class Network:
    """`count` places, numbered from 0, that reach each other without delay until `shape` says otherwise.

    A context manager; leaving it removes everything, but ends no process that runs in a place.
    """

    def __init__(self, count: int) -> None:
        if not 2 <= count <= 250:
            raise BadOption(f"an emulated network of {count} places; 2 to 250 are possible")
        self.count = count
        self._names = [f"bsns-{os.getpid()}-{place}" for place in range(count)]
        self._forwarder: subprocess.Popen[str] | None = None

    def __enter__(self) -> Network:
        """Raises BadOption, saying what this machine lacks."""
        if (problem := hindrance()) is not None:
            raise BadOption(problem)
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, place: int) -> str:
        """The IPv4 address under which the other places reach this one."""
        return f"10.77.0.{place + 1}"

    def file(self, place: int) -> Path:
        """The file of a place's namespace."""
        return NAMESPACES / self._names[place]

    @contextlib.contextmanager
    def entered(self, place: int) -> Iterator[None]:
        """This thread, with the sockets it makes and the processes it starts, is in a place within the block."""
        with _entered(self._names[place]):
            yield

    def shape(self, ways: Mapping[tuple[int, int], Way]) -> None:
        """Replace the ways from one place to another, given as (from, to); in force when this returns."""
        self._ask([[a, b, way.delay_s, way.bytes_per_s, way.loss] for (a, b), way in ways.items()])

    def cut(self, place: int) -> None:
        """Cut a place off: what it and the others send each other from now on is lost, and no connection is reset."""
        self.shape(self._ways(place, Way(bytes_per_s=0.0)))

    def mend(self, place: int) -> None:
        """Undo `cut`; the ways are without delay then."""
        self.shape(self._ways(place, Way()))

    def _ways(self, place: int, way: Way) -> dict[tuple[int, int], Way]:
        others = [other for other in range(self.count) if other != place]
        return {ends: way for other in others for ends in ((place, other), (other, place))}

    def counts(self) -> Counts:
        return self._ask([])

    def close(self) -> None:
        """Remove everything. Can be called twice."""
        if self._forwarder is not None:
            forwarder, self._forwarder = self._forwarder, None
            forwarder.kill()
            forwarder.communicate()
        for name in self._names:
            _remove(name)

    def _build(self) -> None:
        devices: list[int] = []
        try:
            for place, name in enumerate(self._names):
                _ip("netns", "add", name)
                with _entered(name):
                    devices.append(_open_tun("tun0"))
                commands = (
                    "link set lo up",
                    f"addr add {self.address(place)}/24 dev tun0",
                    f"link set tun0 mtu {MTU} txqueuelen 2000 up",
                )
                _ip("-n", name, "-batch", "-", stdin="\n".join(commands) + "\n")
            self._forwarder = subprocess.Popen(
                [sys.executable, "-m", "bsns.bench.forwarder", *map(str, devices)],
                pass_fds=devices,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        finally:
            for device in devices:
                os.close(device)
        self.counts()

    def _ask(self, ways: list[list[float]]) -> Counts:
        forwarder = self._forwarder
        if forwarder is None or forwarder.stdin is None or forwarder.stdout is None:
            raise RuntimeError("use `with Network(…) as network`")
        try:
            forwarder.stdin.write(json.dumps(ways) + "\n")
            forwarder.stdin.flush()
            answer = forwarder.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise PeerFailed(f"the emulated network's forwarder ended with status {forwarder.wait()}")
        return Counts(**json.loads(answer))


def measure(network: Network, one: int, other: int, *, echoes: int = 20, bulk_bytes: int = 1 << 20) -> Way:
    """What a program finds between two places over TCP: half the median round trip, and the rate of a bulk transfer."""
    with network.entered(other):
        listener = socket.create_server((network.address(other), 0))
    with network.entered(one):
        caller = socket.socket()
    thread = threading.Thread(target=_answer, args=(listener, echoes, bulk_bytes), daemon=True)
    thread.start()
    with caller, listener:
        caller.settimeout(30.0)
        caller.connect(listener.getsockname())
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times_s: list[float] = []
        for _ in range(echoes):
            started_s = time.perf_counter()
            caller.sendall(bytes(ECHO))
            _receive(caller, ECHO)
            times_s.append(time.perf_counter() - started_s)
        for _ in range(2):  # the first transfer opens TCP's window
            started_s = time.perf_counter()
            caller.sendall(bytes(bulk_bytes))
            _receive(caller, 1)
            bulk_s = time.perf_counter() - started_s
        thread.join(5.0)
    round_trip_s = sorted(times_s)[len(times_s) // 2]
    return Way(round_trip_s / 2, bulk_bytes / max(bulk_s - round_trip_s, 1e-9))


def _answer(listener: socket.socket, echoes: int, bulk_bytes: int) -> None:
    """The other end of `measure`."""
    stream, _ = listener.accept()
    with stream:
        stream.settimeout(30.0)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(echoes):
            stream.sendall(_receive(stream, ECHO))
        for _ in range(2):
            _receive(stream, bulk_bytes)
            stream.sendall(b"!")


def _receive(stream: socket.socket, size: int) -> bytes:
    data = b""
    left = size
    while left:
        data = stream.recv(min(left, RECEIVE))
        if not data:
            raise PeerFailed("the other end of a measurement has gone")
        left -= len(data)
    return data


def remove_stale() -> list[str]:
    """Remove the places of processes that are no more; their names."""
    stale = [
        path.name
        for path in (NAMESPACES.iterdir() if NAMESPACES.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and not Path("/proc", match[1]).exists()
    ]
    for name in stale:
        _remove(name)
    return stale


def enter(namespace: str) -> None:
    """Move this thread, with the sockets it makes and the processes and threads it starts from now on, to a place."""
    there = os.open(NAMESPACES / namespace, os.O_RDONLY)
    try:
        _setns(there)
    finally:
        os.close(there)


def go_first() -> None:
    """Have this thread, and what it starts from now on, run before the rest of this machine, where that is allowed.

    Emulated machines do not wait for what else their host does. They leave it the time they sleep.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Let this thread, and what it starts within the block, take its turn with the rest of this machine again."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)


@contextlib.contextmanager
def _entered(name: str) -> Iterator[None]:
    """setns(2): of this thread only, which is why it goes back."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        enter(name)
        try:
            yield
        finally:
            _setns(here)
    finally:
        os.close(here)


def _setns(descriptor: int) -> None:
    try:
        set_network(descriptor)
    except OSError as error:
        raise BadOption(f"this process may not enter a network namespace: {error.strerror}; use sudo") from error


def _open_tun(name: str) -> int:
    """A new TUN device of the namespace this thread is in. It lives as long as its descriptor."""
    device = os.open(TUN, os.O_RDWR)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError as error:
        os.close(device)
        raise BadOption(f"no TUN device can be made here: {error.strerror}") from None
    return device


def _ip(*arguments: str, stdin: str | None = None) -> None:
    """Raises BadOption with what `ip` says."""
    done = subprocess.run(["ip", *arguments], input=stdin, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise BadOption(f"ip {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")


def _remove(name: str) -> None:
    if (NAMESPACES / name).exists():
        _ip("netns", "del", name)
