"""Whatever bytes come, reading frames ends in a message, a ProtocolError or PeerLost, and in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.errors import BadFrame, PeerLost, ProtocolError
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.frames import PREFIX, Message, decode_header, encode, split_body
from bsns.protocol.greeting import Hello
from bsns.protocol.inference import (
    Failure,
    Mirror,
    Mirrored,
    Open,
    Part,
    Passed,
    Ping,
    Reroute,
    Rerouted,
    Resize,
    Resized,
    Step,
    There,
    Where,
)
from bsns.protocol.membership import Certificate
from bsns.protocol.probing import Probe, Probed
from bsns.protocol.tensors import TensorSpec
from bsns.transport.framing import FrameReader

VALID: list[tuple[Message, list[bytes]]] = [
    (Ping(7), []),
    (Failure(SessionId(1), "CacheFull", "no room"), []),
    (Reroute(SessionId(1), PeerId("a"), PeerId("c"), ("/ip4/1.2.3.4/tcp/1",)), []),
    (Reroute(SessionId(1), None, PeerId("c"), (), again=True, position=7, passes_from=9), []),
    (Rerouted(SessionId(1)), []),
    (Mirror(SessionId(1), PeerId("c"), ("/ip4/1.2.3.4/tcp/1",), 5), []),
    (Mirrored(SessionId(1), PeerId("c"), "PeerLost", "gone", PeerId("c")), []),
    (Resize(SessionId(1), 20, 12, parked=True), []),
    (Resized(SessionId(1), "CacheFull", "no room", None), []),
    (Where(SessionId(1)), []),
    (There(SessionId(1), 7, 6), []),
    (Hello(1, "ab" * 16, Certificate(b"k" * 32, 1e9, b"s" * 64, b"p" * 64)), []),
    (Open(SessionId(1), ModelId("model"), 0, 4, "float32", 128, 2, None), []),
    (Probe(3, (TensorSpec.raw("probe", "int64", (2,)),)), [bytes(16)]),
    (Probed(3, 1.5), []),
    (
        Step((Part(SessionId(1), 0, 2, 1, (Passed(0.5, 0.25, 2),)),), (TensorSpec.raw("hidden", "float32", (2, 3)),)),
        [bytes(24)],
    ),
]


async def read_all(data: bytes) -> list[Message]:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    stream.feed_eof()
    frames = FrameReader(stream, PeerId("peer"))
    messages: list[Message] = []
    try:
        while True:
            message, views = await frames.receive()
            assert sum(view.nbytes for view in views) <= len(data)
            messages.append(message)
    except (ProtocolError, PeerLost):
        return messages


def read_bounded(data: bytes) -> list[Message]:
    tracemalloc.start()
    try:
        messages = asyncio.run(read_all(data))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    return messages


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_random_bytes(data: bytes) -> None:
    read_bounded(data)


@settings(max_examples=60)
@given(st.binary(max_size=300), st.binary(max_size=64))
def test_random_headers_in_an_honest_prefix(header: bytes, body: bytes) -> None:
    read_bounded(PREFIX.pack(len(header), len(body)) + header + body)


@settings(max_examples=120)
@given(st.sampled_from(VALID), st.data())
def test_mutated_frames(frame: tuple[Message, list[bytes]], data: st.DataObject) -> None:
    raw = bytearray(b"".join(encode(*frame)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    read_bounded(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@given(st.lists(st.sampled_from(VALID), max_size=6))
@settings(max_examples=30)
def test_honest_frames_arrive_as_sent(frames: list[tuple[Message, list[bytes]]]) -> None:
    assert read_bounded(b"".join(b"".join(encode(*frame)) for frame in frames)) == [message for message, _ in frames]


_JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100)
@given(_JSONISH)
def test_any_msgpack_as_header(value: object) -> None:
    header = msgspec.msgpack.encode(value)
    with contextlib.suppress(BadFrame):
        decode_header(header)
    if isinstance(value, dict):
        header = msgspec.msgpack.encode({**value, "type": "step"})
        with contextlib.suppress(ProtocolError):
            split_body(decode_header(header), memoryview(b""))


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float32", "int64", "object", ""]),
            st.lists(st.integers(-(2**62), 2**62), max_size=6),
            st.integers(-(2**62), 2**62),
        ),
        max_size=20,
    ),
    st.integers(0, 64),
)
def test_any_description_of_tensors(specs: list[tuple[str, list[int], int]], body_bytes: int) -> None:
    described = tuple(TensorSpec("t", dtype, tuple(shape), nbytes) for dtype, shape, nbytes in specs)
    try:
        views = split_body(Step((), described), memoryview(bytes(body_bytes)))
    except ProtocolError:
        return
    assert sum(view.nbytes for view in views) == body_bytes
