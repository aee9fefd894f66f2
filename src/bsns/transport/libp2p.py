"""The real transport: streams through hivemind's libp2p daemon (go-libp2p), which proves peer ids and encrypts.

The daemon `p2pd` is a child process; frames travel client process → unix socket → p2pd ⇒ p2pd → unix socket → peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, read_pbmsg_safe, write_pbmsg
from hivemind.proto import crypto_pb2, p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from bsns.core.errors import BadOption, BsnsError, NoSuchSwarm, PeerFailed, PeerLost, PeerUnreachable, PortInUse
from bsns.core.ids import PeerId
from bsns.protocol.frames import Buffer, Message, encode
from bsns.transport import sockets
from bsns.transport.backlog import backlog
from bsns.transport.framing import FrameReader
from bsns.transport.port import MAX_UNSENT_BYTES, Handler, Sent, Take

PROTOCOL = "bsns/1"
WRITE_BUFFER_BYTES = 1024 * 1024
READ_BUFFER_BYTES = 1024 * 1024
UNARY_BYTES = 16 * 1024 * 1024
"""Largest DHT message; the daemon's default of 4 MiB would bound the directory at some 900 records."""
MAX_STREAMS = 4096
MAX_STREAMS_PER_PEER = 128
BOOTSTRAP_DEADLINE_S = 5.0
CLOSE_DEADLINE_S = 1.0

log = logging.getLogger(__name__)
logging.getLogger("hivemind").setLevel(logging.WARNING)

# PR_SET_PDEATHSIG (prctl(2)) outlives the exec: the kernel kills the daemon when its parent dies, however it dies. A
# parent gone before the call is noticed by getppid. A session of its own keeps Ctrl-C from reaching the daemon before
# the node has said goodbye.
_LEASH = """
import ctypes, os, sys
os.setsid()
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class _LeashedP2P(P2P):  # type: ignore[misc]
    """hivemind's P2P whose daemon cannot outlive this process, and whose sockets say whose they are."""

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> P2P:
        cls._UNIX_SOCKET_PREFIX = f"/unix{sockets.prefix()}"
        return await super().create(*args, **kwargs)

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = P2P._make_process_args(*args, **kwargs)
        if sys.platform != "linux":
            return command  # the daemon's idleTimeout ends it there
        return [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command]


class Libp2pStream:
    """One libp2p stream (transport.port.Stream)."""

    def __init__(self, peer: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._limit = READ_BUFFER_BYTES  # type: ignore[attr-defined]  # hivemind opens it with the 64 KiB default
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._peer = peer
        self._frames = FrameReader(reader, peer)
        self._writer = writer
        self._socket = writer.transport
        self._given = 0

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Raises PeerLost or FrameTooLarge; waits only while more than 1 MiB is unsent."""
        self.post(message, buffers)
        if self._socket.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            await self._drain()

    def post(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Raises PeerLost or FrameTooLarge."""
        pieces = encode(message, buffers)
        if self._socket.is_closing():
            raise PeerLost(f"the stream to {self._peer} is closed")
        if self._socket.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._socket.abort()
            raise PeerLost(f"{self._peer} does not read what it is sent")
        self._given += sum(memoryview(piece).nbytes for piece in pieces)
        self._writer.writelines(pieces)

    def sent(self) -> Sent:
        """See transport.port.Stream: what our own daemon has taken, which is all that can be seen."""
        return Sent(self._given, self._given - backlog(self._socket))

    async def send_bytes(self, data: bytes) -> None:
        """Raw bytes in place of a frame: how tests play a hostile peer. Raises PeerLost."""
        if self._socket.is_closing():
            raise PeerLost(f"the stream to {self._peer} is closed")
        self._writer.write(data)
        await self._drain()

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError:
            raise PeerLost(f"the stream to {self._peer} closed while sending") from None

    async def receive(self, max_body_bytes: int | None = None) -> tuple[Message, list[memoryview]]:
        """Raises PeerLost or a ProtocolError."""
        return await self._frames.receive(max_body_bytes)

    async def each(self, take: Take) -> NoReturn:
        """See transport.port.Stream."""
        while True:
            take(*await self.receive())

    async def close(self) -> None:
        """Flush what was sent, for at most a second, then drop the stream."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), CLOSE_DEADLINE_S)
        except (OSError, TimeoutError):
            self._socket.abort()
        except asyncio.CancelledError:
            self._socket.abort()
            raise


class Libp2pTransport:
    """This process's libp2p peer (transport.port.Transport); `p2p` is hivemind's handle, for the directory."""

    def __init__(self, p2p: P2P, addresses: tuple[str, ...]) -> None:
        self.p2p = p2p
        self._peer = PeerId(p2p.peer_id.to_base58())
        self._addresses = addresses
        self._streams: set[Libp2pStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._inbound: Counter[PeerId] = Counter()
        self._closed = False

    @classmethod
    async def start(
        cls,
        identity_seed: bytes,
        *,
        bootstrap: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        announce: Sequence[str] = (),
        listen: bool = True,
    ) -> Libp2pTransport:
        """Start the daemon under the Ed25519 identity of a 32-byte seed (RFC 8032) and connect to `bootstrap`.

        Only loopback is bound unless `host` says otherwise. Raises PortInUse, BadOption, NoSuchSwarm when no bootstrap
        address answers within 5 s, PeerFailed when the daemon does not start.
        """
        address = _checked_host(host)
        for text in (*bootstrap, *announce):
            _checked_multiaddr(text)
        if listen:
            _check_port_free(address, port)
        public = listen and not address.is_loopback
        identity_path = _write_identity(identity_seed)
        try:
            p2p = await _LeashedP2P.create(
                identity_path=identity_path,
                check_if_identity_free=False,
                host_maddrs=[f"/ip{address.version}/{address}/tcp/{port}"] if listen else None,
                announce_maddrs=list(announce) or None,
                no_listen=not listen,
                nat_port_map=public,
                auto_nat=public,
                use_auto_relay=public and bool(bootstrap),
                trusted_relays=list(bootstrap) if public and bootstrap else None,
                persistent_conn_max_msg_size=UNARY_BYTES,
            )
        except P2PDaemonError as error:
            if "address already in use" in str(error):
                raise _port_in_use(port) from None
            raise PeerFailed(f"the libp2p daemon did not start: {error}") from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(identity_path)
        addresses = tuple(str(maddr) for maddr in await p2p.get_visible_maddrs()) if listen else ()
        transport = cls(p2p, addresses)
        try:
            await transport._connect_to_any(bootstrap)
        except BaseException:
            await transport.close()
            raise
        return transport

    async def _connect_to_any(self, bootstrap: Sequence[str]) -> None:
        """Connect to all of `bootstrap` at once. Raises NoSuchSwarm if none answers."""
        others: dict[PeerId, list[str]] = {}
        for text in bootstrap:
            others.setdefault(_peer_of(text), []).append(text)
        others.pop(self._peer, None)
        if not others:
            return
        outcomes = await asyncio.gather(
            *(self._connect(peer, addresses, BOOTSTRAP_DEADLINE_S) for peer, addresses in others.items()),
            return_exceptions=True,
        )
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            if not isinstance(failure, PeerUnreachable):
                raise failure
        if len(failures) == len(outcomes):
            raise NoSuchSwarm(f"nobody answers at {', '.join(bootstrap)}; is the swarm running and the network up?")

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._addresses

    async def dial(self, peer: PeerId, addresses: Sequence[str] = (), *, deadline_s: float = 5.0) -> Libp2pStream:
        """Open a stream; without addresses libp2p's own routing is asked. Raises PeerUnreachable in time."""
        try:
            peer_bytes = PeerID.from_base58(peer).to_bytes()
        except ValueError:
            raise PeerUnreachable(f"{peer!r} is not a peer id") from None
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer_bytes, proto=[PROTOCOL]),
        )
        try:
            async with asyncio.timeout(deadline_s):
                if addresses:
                    await self._connect(peer, addresses, deadline_s)
                _, reader, writer = await self._ask_daemon(peer, request)
        except TimeoutError:
            raise PeerUnreachable(f"{peer} did not answer within {deadline_s:g} s") from None
        stream = Libp2pStream(peer, reader, writer)
        self._keep(stream)
        return stream

    async def _connect(self, peer: PeerId, addresses: Sequence[str], deadline_s: float) -> None:
        """Raises PeerUnreachable. Immediate when connected already."""
        bare = (text.removesuffix(f"/p2p/{peer}") for text in addresses)  # the daemon takes the peer id apart
        usable = [maddr.to_bytes() for text in bare if (maddr := _maddr_or_none(text)) is not None]
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.CONNECT,
            connect=p2pd_pb2.ConnectRequest(peer=PeerID.from_base58(peer).to_bytes(), addrs=usable),
        )
        try:
            async with asyncio.timeout(deadline_s):
                _, _, writer = await self._ask_daemon(peer, request)
        except TimeoutError:
            raise PeerUnreachable(f"{peer} did not answer within {deadline_s:g} s") from None
        writer.close()

    async def _ask_daemon(
        self, peer: PeerId, request: p2pd_pb2.Request
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """One request to our daemon on a connection of its own, which the caller then owns. Raises PeerUnreachable.

        hivemind's client does the same but leaks the connection when cancelled, and we cancel at deadlines.
        """
        if self._closed:
            raise PeerUnreachable(f"cannot reach {peer}: this transport is closed")
        response = p2pd_pb2.Response()
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await self.p2p._client.control.daemon_connector.open_connection()
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise PeerUnreachable(f"cannot reach {peer}: {response.error.msg}")
            return response, reader, writer
        except (OSError, EOFError) as error:
            _abort(writer)
            raise PeerUnreachable(f"cannot reach {peer}: our libp2p daemon is gone ({error})") from None
        except BaseException:
            _abort(writer)
            raise

    async def listen(self, handler: Handler) -> None:
        """Serve the streams others open; beyond 128 from one peer or 4096 in all, new ones are closed at once."""

        async def serve(stream: Libp2pStream) -> None:
            try:
                await handler(stream)
            except BsnsError as error:
                log.debug("the stream from %s ended: %s", stream.peer, error)
            except Exception:
                log.exception("the handler of a stream from %s failed", stream.peer)
            finally:
                self._inbound[stream.peer] -= 1
                if self._inbound[stream.peer] <= 0:
                    del self._inbound[stream.peer]
                self._streams.discard(stream)
                await stream.close()

        async def accept(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = PeerId(info.peer_id.to_base58())
            if self._inbound[peer] >= MAX_STREAMS_PER_PEER or self._inbound.total() >= MAX_STREAMS:
                log.warning("refused a stream from %s: too many are open", peer)
                writer.close()
                return
            self._inbound[peer] += 1
            stream = Libp2pStream(peer, reader, writer)
            self._keep(stream)
            # a task of our own: asyncio's callback logs an error when the one it made is cancelled (Python 3.11)
            task = asyncio.create_task(serve(stream))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        await self.p2p.add_binary_stream_handler(PROTOCOL, accept)

    def _keep(self, stream: Libp2pStream) -> None:
        self._streams = {known for known in self._streams if not known._socket.is_closing()}
        self._streams.add(stream)

    async def lost(self) -> BsnsError:
        """See transport.port.Transport: the daemon has ended, and nobody can reach us any more."""
        status = await self.p2p._child.wait()
        return PeerFailed(f"the libp2p daemon of this process ended with status {status}; start it again")

    async def close(self) -> None:
        """Close every stream and end the daemon; leaves no child, socket or file behind."""
        if self._closed:
            return
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *(stream.close() for stream in self._streams), return_exceptions=True)
        helpers = [task for task in _helper_tasks(self.p2p) if task is not None]
        child = self.p2p._child
        try:
            await asyncio.wait_for(self.p2p.shutdown(), 5.0)
        except TimeoutError:
            child.kill()
            await child.wait()
        await asyncio.gather(*helpers, return_exceptions=True)


def _helper_tasks(p2p: P2P) -> list[asyncio.Task[Any] | None]:
    control = p2p._client.control
    return [p2p._listen_task, p2p._reader_task, control._read_task, control._write_task]


def _abort(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()


def _write_identity(seed: bytes) -> str:
    """A libp2p PrivateKey protobuf in a fresh file of mode 0600: Ed25519 keys are seed and public key, 64 bytes.

    https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    """
    if len(seed) != 32:
        raise BadOption(f"an identity seed has 32 bytes, not {len(seed)}")
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=seed + public)
    handle, path = tempfile.mkstemp(prefix="bsns-identity-")
    with os.fdopen(handle, "wb") as file:
        file.write(key.SerializeToString())
    return path


def _checked_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise BadOption(f"{host!r} is not an IP address to listen on; try 127.0.0.1, or 0.0.0.0 for all") from None


def _checked_multiaddr(text: str) -> None:
    if _maddr_or_none(text) is None:
        raise BadOption(f"{text!r} is not a multiaddress such as /ip4/192.0.2.1/tcp/4001")


def _maddr_or_none(text: str) -> Multiaddr | None:
    try:
        maddr = Multiaddr(text)
        maddr.to_bytes()
    except (ValueError, LookupError, TypeError):
        return None
    return maddr


def _peer_of(text: str) -> PeerId:
    _, found, peer = text.rpartition("/p2p/")
    try:
        PeerID.from_base58(peer)
    except ValueError:
        found = ""
    if not found or not peer:
        raise BadOption(f"{text!r} does not end in /p2p/ and a peer id")
    return PeerId(peer)


def _check_port_free(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> None:
    """Raises PortInUse or BadOption. The daemon itself would share a taken port silently (SO_REUSEPORT)."""
    if not 0 <= port <= 65535:
        raise BadOption(f"{port} is not a port; take one of 1024 to 65535, or 0 for any")
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
        try:
            probe.bind((str(address), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _port_in_use(port) from None
            raise BadOption(f"cannot listen on {address} port {port}: {error.strerror}") from None


def _port_in_use(port: int) -> PortInUse:
    return PortInUse(f"port {port} is taken by another process; choose another, or 0 for any free one")
