"""Direct streams: TCP between two peers that have met over libp2p, for the path tokens take.

Every frame of a libp2p stream crosses two daemon processes each way; on an idle machine waking them costs 0.3 ms a hop
(docs/decisions/0004-direct-streams.md). So a peer that admits another offers it, over their encrypted libp2p stream, an
address, a one-time token and a fresh key. Whoever connects and shows the token gets a stream on which every frame is
sealed with AES-256-GCM (NIST SP 800-38D) under that key, a counter per direction as nonce. Where the address cannot be
reached (NAT, firewalls) both simply stay on libp2p.

    token (16 bytes), once, then both ways: u32 length | sealed frame

The first frame is the listener's Pong: it shows the dialler that the peer itself is at the other end.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bsns.core.errors import BadFrame, BsnsError, FrameTooLarge, PeerLost, PeerUnreachable
from bsns.core.ids import PeerId
from bsns.protocol.frames import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX,
    Buffer,
    Message,
    check_lengths,
    decode_header,
    encode,
    split_body,
)
from bsns.protocol.greeting import DirectOffer
from bsns.protocol.inference import Pong
from bsns.transport.backlog import backlog
from bsns.transport.port import MAX_UNSENT_BYTES, Handler, Sent, Take

log = structlog.get_logger(__name__)

TOKEN_BYTES = 16
KEY_BYTES = 32
TAG_BYTES = 16
OFFER_LIFETIME_S = 10.0
MAX_OFFERS = 1024
MAX_STREAMS_PER_PEER = 16
"""Direct streams one peer may hold: each may keep a frame in the making, and an honest peer needs one."""
CONNECT_S = 0.5
MAX_HOSTS = 4
HIGH_WATER_BYTES = 1 << 20
MAX_WAITING_BYTES = 4 * MAX_BODY_BYTES
"""Received but not yet taken frames beyond this stop the reading."""

_LENGTH = struct.Struct("<I")
_NONCE = struct.Struct("<IQ")
_MAX_SEALED = PREFIX.size + MAX_HEADER_BYTES + MAX_BODY_BYTES + TAG_BYTES


class DirectStream(asyncio.Protocol):
    """One sealed TCP stream (transport.port.Stream)."""

    def __init__(self, peer: PeerId, key: bytes, *, dialled: bool) -> None:
        self._peer = peer
        self._seal = AESGCM(key)
        self._out, self._in = (0, 1) if dialled else (1, 0)
        self._sent = 0
        self._given = 0
        self._received = 0
        self._buffer = bytearray()
        self._frames: deque[tuple[Message, memoryview]] = deque()
        self._waiting_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._ended: Exception | None = None
        self._paused = False
        self._arrival: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._end_of_each: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """See transport.port.Stream."""
        self.post(message, buffers)
        if not self._writable.is_set():
            await self._writable.wait()
            if self._transport is None or self._transport.is_closing():
                raise self._lost()

    def post(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """See transport.port.Stream."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise self._lost()
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            transport.abort()
            raise PeerLost(f"{self._peer} does not read what it is sent")
        frame = b"".join(encode(message, buffers))
        length = _LENGTH.pack(len(frame) + TAG_BYTES)
        sealed = self._seal.encrypt(_NONCE.pack(self._out, self._sent), frame, length)
        self._sent += 1
        self._given += len(length) + len(sealed)
        transport.write(length + sealed)

    def sent(self) -> Sent:
        """See transport.port.Stream."""
        return Sent(self._given, self._given - (backlog(self._transport) if self._transport is not None else 0))

    async def receive(self, max_body_bytes: int | None = None) -> tuple[Message, list[memoryview]]:
        """See transport.port.Stream. The frame was within the protocol's limits before it was opened."""
        while not self._frames:
            if self._ended is not None:
                raise self._ended
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        message, body = self._frames.popleft()
        self._waiting_bytes -= body.nbytes
        if self._paused and self._waiting_bytes < MAX_WAITING_BYTES and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        if max_body_bytes is not None and body.nbytes > max_body_bytes:
            raise FrameTooLarge(f"frame body of {body.nbytes} bytes; only {max_body_bytes} are allowed here")
        return message, split_body(message, body)

    async def each(self, take: Take) -> NoReturn:
        """See transport.port.Stream. `take` is called as soon as a frame is complete, without a turn of the loop."""
        while self._frames:
            take(*await self.receive())
        if self._ended is not None:
            raise self._ended
        self._take = take
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end_of_each = end
        await end
        raise AssertionError("ended without a reason")

    async def close(self) -> None:
        """See transport.port.Stream."""
        if self._transport is not None:
            self._transport.close()

    def itself(self) -> DirectStream:
        """What an event loop calls for the protocol of a new connection."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.start(transport)  # type: ignore[arg-type]

    def present(self, token: bytes) -> None:
        """Show the listener the token, before anything else is sent."""
        if self._transport is not None:
            self._transport.write(token)

    def start(self, transport: asyncio.Transport, early: bytes = b"") -> None:
        """Begin on a connection, with what had arrived behind the token."""
        self._transport = transport
        transport.set_write_buffer_limits(HIGH_WATER_BYTES)
        if (raw := transport.get_extra_info("socket")) is not None:
            notice_silence(raw)
        if early:
            self.data_received(early)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while (frame := self._open()) is not None:
                if self._take is not None:
                    self._take(frame[0], split_body(*frame))
                else:
                    self._frames.append(frame)
                    self._waiting_bytes += frame[1].nbytes
        except Exception as error:  # noqa: BLE001  whoever awaits the stream's frames must hear of it
            self._end(error)
            return
        if self._waiting_bytes > MAX_WAITING_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._writable.set()
        if self._ended is None:
            self._ended = self._lost(error)
        self._wake()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _open(self) -> tuple[Message, memoryview] | None:
        """The next whole frame in the buffer. Raises FrameTooLarge, BadFrame."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._buffer)
        if not PREFIX.size + TAG_BYTES <= size <= _MAX_SEALED:
            raise FrameTooLarge(f"a sealed frame of {size} bytes; the limit is {_MAX_SEALED}")
        end = _LENGTH.size + size
        if len(self._buffer) < end:
            return None
        length, sealed = bytes(self._buffer[: _LENGTH.size]), bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            frame = self._seal.decrypt(_NONCE.pack(self._in, self._received), sealed, length)
        except InvalidTag:
            raise BadFrame("a frame's seal does not hold") from None
        self._received += 1
        header_bytes, body_bytes = PREFIX.unpack_from(frame)
        check_lengths(header_bytes, body_bytes)
        if PREFIX.size + header_bytes + body_bytes != len(frame):
            raise BadFrame("a frame's lengths do not add up")
        view = memoryview(frame)
        body_at = PREFIX.size + header_bytes
        return decode_header(view[PREFIX.size : body_at]), view[body_at:]

    def _end(self, error: Exception) -> None:
        """Hear nothing more; what is left to say, such as why, can still be sent before the stream is closed."""
        self._ended = error
        if self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        if self._ended is not None and self._end_of_each is not None and not self._end_of_each.done():
            self._end_of_each.set_exception(self._ended)

    def _lost(self, error: Exception | None = None) -> PeerLost:
        return PeerLost(f"the stream to {self._peer} closed{f' ({error})' if error else ''}")


class DirectListener:
    """Takes direct connections from peers that were offered one."""

    def __init__(self) -> None:
        self._offers: dict[bytes, tuple[PeerId, bytes, float]] = {}
        self.knocking: set[_Knock] = set()
        """Connections that have not shown a token yet; as many as offers may stand, no more."""
        self._server: asyncio.Server | None = None
        self._hosts: tuple[str, ...] = ()
        self._streams: set[DirectStream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._handler: Handler | None = None

    async def start(self, host: str, hosts: Sequence[str], handler: Handler) -> None:
        """Listen on a free port of `host`; `hosts` are the names under which others reach it."""
        self._handler = handler
        self._hosts = tuple(dict.fromkeys(hosts))
        self._server = await asyncio.get_running_loop().create_server(lambda: _Knock(self), host, 0)

    def offer(self, peer: PeerId) -> DirectOffer | None:
        """A fresh offer for a peer just admitted, good for one connection within `OFFER_LIFETIME_S`."""
        if self._server is None:
            return None
        now_s = time.monotonic()
        for token in [token for token, (_, _, end_s) in self._offers.items() if end_s < now_s]:
            del self._offers[token]
        if len(self._offers) >= MAX_OFFERS:
            return None
        token, key = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(KEY_BYTES)
        self._offers[token] = (peer, key, now_s + OFFER_LIFETIME_S)
        return DirectOffer(self._hosts, self._server.sockets[0].getsockname()[1], token, key)

    def redeem(self, token: bytes, transport: asyncio.Transport, early: bytes) -> DirectStream | None:
        """The stream for whoever shows a token, or None for a stranger."""
        peer, key, end_s = self._offers.pop(token, (None, b"", 0.0))
        if peer is None or end_s < time.monotonic() or self._handler is None:
            return None
        if sum(stream.peer == peer for stream in self._streams) >= MAX_STREAMS_PER_PEER:
            return None
        stream = DirectStream(peer, key, dialled=False)
        transport.set_protocol(stream)
        stream.start(transport, early)
        stream.post(Pong(0))
        self._streams.add(stream)
        task = asyncio.get_running_loop().create_task(self._serve(stream, self._handler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def close(self) -> None:
        """Stop listening and close every stream taken."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for stream in list(self._streams):
            await stream.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, stream: DirectStream, handler: Handler) -> None:
        try:
            await handler(stream)
        except BsnsError as error:
            log.info("a stream ended", peer=stream.peer, reason=error.message)
        except Exception:
            log.exception("serving a stream failed", peer=stream.peer)
        finally:
            self._streams.discard(stream)
            await stream.close()


class _Knock(asyncio.Protocol):
    """A connection that has not shown its token yet; it has `OFFER_LIFETIME_S` to do so."""

    def __init__(self, listener: DirectListener) -> None:
        self._listener = listener
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self._listener.knocking) >= MAX_OFFERS:
            transport.close()
            return
        self._listener.knocking.add(self)
        self._transport = transport  # type: ignore[assignment]
        self._late = asyncio.get_running_loop().call_later(OFFER_LIFETIME_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) < TOKEN_BYTES or self._transport is None or self._late is None:
            return
        self._late.cancel()
        self._listener.knocking.discard(self)
        token, early = self._buffer[:TOKEN_BYTES], self._buffer[TOKEN_BYTES:]
        if self._listener.redeem(token, self._transport, early) is None:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.knocking.discard(self)
        if self._late is not None:
            self._late.cancel()


async def connect(peer: PeerId, offer: DirectOffer) -> DirectStream:
    """Take up an offer. Raises PeerUnreachable, after `CONNECT_S` per host at the latest."""
    if len(offer.token) != TOKEN_BYTES or len(offer.key) != KEY_BYTES:
        raise PeerUnreachable(f"{peer} offered a direct stream that cannot be")
    for host in offer.hosts[:MAX_HOSTS]:
        stream = DirectStream(peer, offer.key, dialled=True)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_connection(stream.itself, host, offer.port)
                stream.present(offer.token)
                await stream.receive()  # whoever can seal a frame is the peer, and not somebody else at its address
                return stream
        except (OSError, TimeoutError, BsnsError, ValueError, OverflowError):  # the last two: no host, no port at all
            await stream.close()
    raise PeerUnreachable(f"{peer} cannot be reached directly at {', '.join(offer.hosts)} port {offer.port}")


def notice_silence(raw: socket.socket) -> None:
    """Let the kernel end a connection whose other host has vanished without a word, after some 25 s.

    What was sent and not acknowledged ends it after 20 s (TCP_USER_TIMEOUT, RFC 5482), where the system has that.
    """
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, name):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hosts_of(addresses: Sequence[str]) -> tuple[str, ...]:
    """The hosts in a peer's multiaddresses, each once; loopback, everybody's own, only if there is no other."""
    named = (address.split("/") for address in addresses)
    kinds = ("ip4", "ip6", "dns4", "dns6")
    hosts = dict.fromkeys(part[2] for part in named if len(part) > 2 and part[1] in kinds)
    return tuple(host for host in hosts if not _is_loopback(host)) or tuple(hosts)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"
