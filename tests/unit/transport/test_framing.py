"""Reading frames: nothing is allocated on a stranger's word, and nothing is lost by a cancelled read."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from bsns.core.errors import FrameTooLarge, PeerLost
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.frames import MAX_BODY_BYTES, PREFIX, encode
from bsns.protocol.inference import Part, Ping, Step
from bsns.protocol.tensors import TensorSpec
from bsns.transport.framing import FrameReader


def reader_of(data: bytes) -> tuple[asyncio.StreamReader, FrameReader]:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    return stream, FrameReader(stream, PeerId("peer"))


@pytest.mark.parametrize("lengths", [(0xFFFFFFFF, 0), (10, 0xFFFFFFFF)])
async def test_a_huge_announced_length_is_refused_before_allocation(lengths: tuple[int, int]) -> None:
    _, frames = reader_of(PREFIX.pack(*lengths))
    tracemalloc.start()
    with pytest.raises(FrameTooLarge):
        await frames.receive()
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


async def test_memory_follows_what_arrives_not_what_is_announced() -> None:
    spec = TensorSpec.raw("hidden", "float32", (MAX_BODY_BYTES // 4,))
    frame = encode(Step((Part(SessionId(1), 0, 1, 0),), (spec,)), [bytes(MAX_BODY_BYTES)])
    stream, frames = reader_of(bytes(frame[0]))
    tracemalloc.start()
    waiting = asyncio.create_task(frames.receive())
    for _ in range(5):
        await asyncio.sleep(0)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    stream.feed_eof()
    with pytest.raises(PeerLost):
        await waiting


async def test_a_receive_cancelled_anywhere_inside_a_frame_goes_on_where_it_stopped() -> None:
    step = Step((Part(SessionId(1), 0, 1, 0),), (TensorSpec.raw("hidden", "float32", (2,)),))
    data = b"".join(encode(step, [b"abcdefgh"])) + b"".join(encode(Ping(1)))
    stream, frames = reader_of(b"")
    for byte in data[: len(data) - 1]:
        waiting = asyncio.create_task(frames.receive())
        await asyncio.sleep(0)
        stream.feed_data(bytes([byte]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if waiting.done():
            message, (view,) = waiting.result()
            assert (message, bytes(view)) == (step, b"abcdefgh")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    stream.feed_data(data[-1:])
    assert (await frames.receive())[0] == Ping(1)
