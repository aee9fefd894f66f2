"""The zygote: a process that has loaded the libraries, and from which nodes of this machine are forked (Linux).

Loading torch and what stands on it takes some 4 s of a core and 300 MB, as much in every node that loads them for
itself. What is forked begins at once and shares that memory. It is `bsns serve` as users run it, and whatever else they
run: a process of its own, with its own arguments, environment, directory and files.

Who asks for a process holds a connection to the zygote as long as that process lives; it is told its id and, in the
end, its exit status. Where the connection goes, the process is killed: it never outlives whoever asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import setproctitle

from bsns.core.errors import PeerFailed
from bsns.node.leash import die_with_parent

COMMAND = "bsns.cli.main"
LIBRARIES = (COMMAND, "bsns.node.server", "bsns.node.client", "bsns.transport.libp2p", "bsns.swarm.hivemind_directory")
CLONE_NEWNET = 0x40000000
MAX_REQUEST = 1 << 20
"""Bytes: arguments and environment together."""
REQUEST_S = 5.0
"""What it may take to send one."""
MOST_FILES = 4
GONE = "no process could be started from the one that loads the libraries"
_HEAD = struct.Struct("<I")
_WORD = struct.Struct("<i")


class Zygote:
    """One that is running, or about to: the libraries load while others go on. Its processes end with it."""

    def __init__(self) -> None:
        """Start it. It ends with the thread that does: with this process, if that is its first."""
        self._network = _own_network()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # a process with threads cannot be forked
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is ours to pass on
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        files: tuple[int, int, int],
        network: Path | None = None,
    ) -> socket.socket:
        """Ask for the `bsns` command with these arguments, in a session of its own; for the rest it begins as if this
        thread had started it: in this directory and network, and with the same claim to the processor.

        `files`: the descriptors that it shall have as standard input, output and error. `network`: the file of the
        network namespace that it shall be in, if not this thread's.

        Returns its connection. Raises PeerFailed.
        """
        policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
        turn = [policy, parameter.sched_priority, sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)]
        request = json.dumps([list(arguments), dict(environment), os.getcwd(), turn]).encode()
        there = os.open(network or _THIS_NETWORK, os.O_RDONLY)
        sent = [*files, there] if network is not None or _own_network() != self._network else list(files)
        connection, theirs = socket.socketpair()
        try:
            socket.send_fds(self._socket, [b"+"], [theirs.fileno()])
            socket.send_fds(connection, [_HEAD.pack(len(request))], sent)
            connection.sendall(request)
        except OSError as error:
            connection.close()
            raise PeerFailed(f"{GONE}: {error}") from error
        finally:
            theirs.close()
            os.close(there)
        return connection


class Forked:
    """A process of the zygote's, which lives as long as its connection does at most."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._status: int | None = None

    @classmethod
    def begun(cls, connection: socket.socket) -> Forked:
        """The process that was asked for, as soon as it is there: the first has to wait for the libraries. Raises
        PeerFailed."""
        try:
            return cls(connection, *_WORD.unpack(_read(connection, _WORD.size)))
        except (OSError, EOFError) as error:
            connection.close()
            raise PeerFailed(f"{GONE}: {error}") from error

    @classmethod
    async def beginning(cls, connection: socket.socket) -> Forked:
        """As `begun`, for an event loop."""
        connection.setblocking(False)
        try:
            word = await asyncio.get_running_loop().sock_recv(connection, _WORD.size)  # too short to come in pieces
            return cls(connection, *_WORD.unpack(word))
        except BaseException as error:
            connection.close()
            if isinstance(error, (OSError, struct.error)):
                raise PeerFailed(GONE) from error
            raise

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._connection.fileno()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status, or None if it still lives after so long. That of a signal is negative."""
        if self._status is None:
            self._connection.settimeout(timeout_s)
            try:
                (self._status,) = _WORD.unpack(_read(self._connection, _WORD.size))
            except (TimeoutError, BlockingIOError):
                return None
            except (OSError, EOFError):  # the zygote is gone, and took it along
                self._status = -signal.SIGKILL
            self._connection.close()
        return self._status

    def send_signal(self, signum: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        if self.wait(0.0) is not None:
            raise ProcessLookupError(f"process {self.pid} has ended")
        os.kill(self.pid, signum)


_running: Zygote | None = None


def zygote() -> Zygote:
    """This process's, which is started if there is none: call it early, from the first thread."""
    global _running
    if _running is None or not _running.runs:
        _running = Zygote()
    return _running


def set_network(descriptor: int) -> None:
    """setns(2): move this thread, with the sockets, threads and processes it makes from now on, to a network namespace.

    Raises OSError.
    """
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_THIS_NETWORK = Path("/proc/thread-self/ns/net")


def _own_network() -> str:
    return os.readlink(_THIS_NETWORK)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError("it is gone")
        data += piece
    return data


def _serve(owner: socket.socket) -> None:
    """Fork whenever the owner asks, and say what became of it, until the owner is gone."""
    children: dict[int, socket.socket] = {}
    woken, waking = os.pipe()
    for end in (woken, waking):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking)
    selector = selectors.DefaultSelector()
    selector.register(owner, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is owner:
                asked, descriptors, _, _ = socket.recv_fds(owner, 1, 1)
                if not asked:
                    return
                connection = socket.socket(fileno=descriptors[0])
                try:
                    pid = _fork(connection)
                except (OSError, EOFError, ValueError):  # whoever asks for nothing sensible gets nothing
                    connection.close()
                else:
                    children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    _tell(connection, pid)
            elif key.fileobj == woken:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                for pid, status in _ended():
                    with children.pop(pid) as connection:
                        with contextlib.suppress(KeyError):
                            selector.unregister(connection)
                        _tell(connection, status)
            elif key.data in children:  # whoever asked for it is gone
                selector.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody is there any more, which is noticed elsewhere
        connection.sendall(_WORD.pack(number))


def _ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, and how."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def _fork(connection: socket.socket) -> int:
    """Read a request and fork for it. Raises OSError, EOFError, ValueError where there is none that makes sense."""
    connection.settimeout(REQUEST_S)
    head, files, _, _ = socket.recv_fds(connection, _HEAD.size, MOST_FILES)
    try:
        (size,) = _HEAD.unpack(head.ljust(_HEAD.size))
        if size > MAX_REQUEST or len(files) < 3:
            raise ValueError("not a request")
        arguments, environment, directory, turn = json.loads(_read(connection, size))
        parent = os.getpid()
        if pid := os.fork():
            return pid
        with _fatal():
            _take_turn(*turn)
            _become(arguments, environment, directory, files, parent)
    finally:
        for descriptor in files:
            os.close(descriptor)
    os._exit(1)


@contextlib.contextmanager
def _fatal() -> Iterator[None]:
    """A forked process that cannot become what it should says why and ends; it must not return to the zygote's loop."""
    try:
        yield
    except BaseException:  # noqa: BLE001  whatever it is, there are two of us
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _take_turn(policy: int, priority: int, affinity: Sequence[int], nice: int) -> None:
    """Claim as much of the processor as whoever asked for us, where that is allowed."""
    os.sched_setaffinity(0, affinity)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, policy, os.sched_param(priority))


def _become(
    arguments: Sequence[str], environment: Mapping[str, str], directory: str, files: Sequence[int], parent: int
) -> NoReturn:
    """Be the process that was asked for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    die_with_parent(parent)
    for number, (descriptor, name) in enumerate(zip(files[:3], ("stdin", "stdout", "stderr"), strict=True)):
        os.dup2(descriptor, number)
        before = getattr(sys, name)  # knows whether what it was opened on could be wound back
        buffering, encoding, errors = 1 if number == 2 else -1, before.encoding, before.errors
        mode = "r" if number == 0 else "w"
        setattr(sys, name, open(number, mode, buffering, encoding, errors, closefd=False))  # noqa: SIM115  to the end
    if len(files) == MOST_FILES:
        set_network(files[3])
    os.closerange(3, 1 + max(map(int, os.listdir("/proc/self/fd"))))  # the zygote's, and others' connections to it
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    setproctitle.setproctitle(" ".join(["bsns", *arguments]))
    sys.argv = ["bsns", *arguments]
    importlib.import_module("bsns.cli").parent = parent  # type: ignore[attr-defined]
    importlib.import_module(COMMAND).main()
    os._exit(0)


def main() -> None:
    """Called with the owner's process id, and the descriptor of a socket to it."""
    setproctitle.setproctitle("bsns zygote")  # for its first use it needs the environment we began with
    die_with_parent(int(sys.argv[1]))
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is here stays; nobody who is forked shall write to it while looking for what does not
    _serve(socket.socket(fileno=int(sys.argv[2])))
    os._exit(0)


if __name__ == "__main__":
    main()
