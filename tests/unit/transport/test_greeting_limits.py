"""Frames off a byte stream, before the peer behind it has been admitted."""

from __future__ import annotations

import asyncio

import pytest

from bsns.core.errors import FrameTooLarge
from bsns.core.ids import PeerId
from bsns.protocol.frames import PREFIX
from bsns.transport.framing import GREETING_HEADER_BYTES, FrameReader


@pytest.mark.parametrize("lengths", [(GREETING_HEADER_BYTES + 1, 0), (10, 1)])
async def test_a_stranger_may_announce_little(lengths: tuple[int, int]) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(PREFIX.pack(*lengths))  # and not a byte of what it announces
    with pytest.raises(FrameTooLarge):
        await asyncio.wait_for(FrameReader(reader, PeerId("x")).receive(max_body_bytes=0), 5)
