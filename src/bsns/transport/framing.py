"""Frames off a byte stream: what every transport's receiving side shares."""

from __future__ import annotations

import asyncio

from bsns.core.errors import FrameTooLarge, PeerLost, ProtocolError
from bsns.core.ids import PeerId
from bsns.protocol.frames import PREFIX, Message, check_lengths, decode_header, split_body

GREETING_HEADER_BYTES = 16 * 1024
"""The longest header taken where a body is limited too: from a peer that has not been admitted yet."""
CHUNK_BYTES = 1024 * 1024
"""A body is gathered in chunks of at most this size: memory follows what arrives, not what was announced."""


class FrameReader:
    """Reads one peer's frames, in order; a cancelled `receive` loses nothing, the next one goes on where it stopped."""

    def __init__(self, reader: asyncio.StreamReader, peer: PeerId) -> None:
        self._reader = reader
        self._peer = peer
        self._lengths: tuple[int, int] | None = None
        self._header: bytes | None = None
        self._body = bytearray()
        self._broken = False

    async def receive(self, max_body_bytes: int | None = None) -> tuple[Message, list[memoryview]]:
        """The next message and writable views of its tensors. Raises PeerLost, or a ProtocolError, then PeerLost."""
        if self._broken:
            raise PeerLost(f"the stream to {self._peer} broke the protocol before and is of no more use")
        try:
            if self._lengths is None:
                self._lengths = PREFIX.unpack(await self._reader.readexactly(PREFIX.size))
            header_bytes, body_bytes = self._lengths
            check_lengths(header_bytes, body_bytes)
            if max_body_bytes is not None and header_bytes > GREETING_HEADER_BYTES:
                raise FrameTooLarge(f"frame header of {header_bytes} bytes; {GREETING_HEADER_BYTES} are allowed here")
            if max_body_bytes is not None and body_bytes > max_body_bytes:
                raise FrameTooLarge(f"frame body of {body_bytes} bytes; at most {max_body_bytes} are allowed here")
            if self._header is None:
                self._header = await self._reader.readexactly(header_bytes)
            while (wanted := body_bytes - len(self._body)) > 0:
                chunk = await self._reader.read(min(wanted, CHUNK_BYTES))
                if not chunk:
                    raise PeerLost(f"{self._peer} closed the stream inside a frame")
                self._body += chunk
            message = decode_header(self._header)
            views = split_body(message, memoryview(self._body))
        except (asyncio.IncompleteReadError, OSError):
            raise PeerLost(f"{self._peer} closed the stream") from None
        except ProtocolError:
            self._broken = True
            self._body = bytearray()
            raise
        self._lengths, self._header, self._body = None, None, bytearray()
        return message, views
