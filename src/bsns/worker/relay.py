"""Streams to the next stages: one per neighbour, shared by all sessions, opened when first needed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.protocol.frames import Buffer, Message
from bsns.transport.port import Stream

Dial = Callable[[PeerId, Sequence[str]], Awaitable[Stream]]
"""Opens a stream to a peer and greets it; raises PeerError or ProtocolError within a deadline of its own."""


class Relay:
    """Outgoing streams by peer. Frames to one peer keep the order in which `send` was called."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._streams: dict[PeerId, Stream] = {}
        self._locks: dict[PeerId, asyncio.Lock] = {}

    async def send(
        self, peer: PeerId, addresses: Sequence[str], message: Message, buffers: Sequence[Buffer] = ()
    ) -> None:
        """Send a frame, dialling first if need be. Raises PeerError; the next send dials anew."""
        async with self._locks.setdefault(peer, asyncio.Lock()):
            stream = await self._stream(peer, addresses)
            try:
                await stream.send(message, buffers)
            except BsnsError:
                await self._forget(peer)
                raise

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Make sure there is a stream. Raises PeerError."""
        async with self._locks.setdefault(peer, asyncio.Lock()):
            await self._stream(peer, addresses)

    async def close(self) -> None:
        for peer in list(self._streams):
            await self._forget(peer)

    async def _stream(self, peer: PeerId, addresses: Sequence[str]) -> Stream:
        stream = self._streams.get(peer)
        if stream is None:
            stream = self._streams[peer] = await self._dial(peer, addresses)
        return stream

    async def _forget(self, peer: PeerId) -> None:
        stream = self._streams.pop(peer, None)
        if stream is not None:
            await stream.close()
