"""Streams to the next stages: one per neighbour, shared by all sessions, opened when first needed."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence

import structlog

from bsns.core.errors import BadFrame, BsnsError, PeerLost, error_from_wire
from bsns.core.ids import PeerId
from bsns.protocol.frames import Buffer, Message
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import Failure
from bsns.transport.port import Dial, Stream

log = structlog.get_logger(__name__)

MOST_DIALS = 16
"""How many peers are dialled for one client at once: it may name any, and each takes a connection or several."""


class Relay:
    """Outgoing streams by peer. Frames to one peer keep the order in which they were posted."""

    def __init__(
        self, dial: Dial, on_failure: Callable[[PeerId, Failure], None], on_lost: Callable[[PeerId], None]
    ) -> None:
        """`on_failure` is told of sessions a peer no longer has, `on_lost` of every peer whose stream has ended."""
        self._dial = dial
        self._on_failure = on_failure
        self._on_lost = on_lost
        self._streams: dict[PeerId, Stream] = {}
        self._watching: dict[PeerId, asyncio.Task[None]] = {}
        self._dialling: set[asyncio.Task[None]] = set()
        self._turns: weakref.WeakValueDictionary[PeerId, asyncio.Semaphore] = weakref.WeakValueDictionary()
        """By client."""
        # by peer and addresses, so that whoever names wrong ones holds up nobody else; each as long as it is in use
        self._locks: weakref.WeakValueDictionary[tuple[PeerId, Sequence[str]], asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )

    def post(self, peer: PeerId, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send a frame to a peer that sessions have connected to. Raises PeerLost; the next `connect` dials anew."""
        try:
            self._stream(peer).post(message, buffers)
        except BsnsError as error:
            raise error.about(peer) from None

    async def send(self, peer: PeerId, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """As `post`, but wait while much lies unsent."""
        try:
            await self._stream(peer).send(message, buffers)
        except BsnsError as error:
            raise error.about(peer) from None

    def sent(self, peer: PeerId | None) -> tuple[int, int]:
        """How many bytes a peer was sent over the stream there is, and how many of them it has taken."""
        stream = self._streams.get(peer) if peer is not None else None
        return stream.sent() if stream is not None else (0, 0)

    def _stream(self, peer: PeerId) -> Stream:
        stream = self._streams.get(peer)
        if stream is None:
            raise PeerLost(f"the stream to the next stage {peer} closed")
        return stream

    async def connect(self, peer: PeerId, addresses: Sequence[str], client: PeerId) -> None:
        """Make sure there is a stream, for a session of this client. Raises PeerError."""
        if peer in self._streams:
            return
        turns = self._turns.setdefault(client, asyncio.Semaphore(MOST_DIALS))
        await turns.acquire()

        def ended(dialling: asyncio.Task[None]) -> None:
            self._dialling.discard(dialling)
            turns.release()
            if not dialling.cancelled():
                dialling.exception()  # nobody may be waiting for it any more

        # One that nobody waits for any more goes on: what it holds, it holds until it ends, and so it keeps its turn.
        dialling = asyncio.create_task(self._reach(peer, addresses))
        self._dialling.add(dialling)
        dialling.add_done_callback(ended)
        await asyncio.shield(dialling)

    async def _reach(self, peer: PeerId, addresses: Sequence[str]) -> None:
        lock = self._locks.setdefault((peer, tuple(addresses)), asyncio.Lock())
        async with lock:
            if peer in self._streams:
                return
            try:
                stream = await self._dial(peer, addresses)
            except BsnsError as error:
                raise error.about(peer) from None
            if peer in self._streams:  # reached meanwhile, at other addresses
                await stream.close()
                return
            self._streams[peer] = stream
            self._watching[peer] = asyncio.create_task(self._watch(stream))

    async def close(self) -> None:
        dialling = list(self._dialling)
        for task in dialling:
            task.cancel()
        await asyncio.gather(*dialling, return_exceptions=True)
        for task in self._watching.values():
            task.cancel()
        await asyncio.gather(*self._watching.values(), return_exceptions=True)

    async def _watch(self, stream: Stream) -> None:
        """A next stage says nothing back but which sessions it does not have: anything else ends the stream."""
        try:
            await stream.each(lambda message, _: self._take(stream.peer, message))
        except BsnsError as error:
            log.info("lost a next stage", peer=stream.peer, reason=error.message)
        finally:
            if self._streams.get(stream.peer) is stream:
                del self._streams[stream.peer]
            await stream.close()
            self._on_lost(stream.peer)

    def _take(self, peer: PeerId, message: Message) -> None:
        match message:
            case Failure():
                self._on_failure(peer, message)
            case Refusal():
                raise error_from_wire(message.code, message.message)
            case _:
                raise BadFrame(f"a next stage does not say {type(message).__name__}")
