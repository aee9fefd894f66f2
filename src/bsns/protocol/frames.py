"""Frames: one message and its named tensors as bytes.

    u32 header length | u32 body length | header (msgpack) | body (the tensors' bytes, back to back)

Lengths are little-endian. The header is one message of `Message`; a message that carries tensors describes each in its
`tensors` field, and the body is cut along those descriptions. Nothing is ever unpickled, and no length is believed
before it is checked against the limits below.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import msgspec

from bsns.core.errors import BadFrame, BadTensor, FrameTooLarge
from bsns.protocol.codecs import ACTIVATIONS, CODECS, RAW
from bsns.protocol.greeting import Hello, Refusal, Welcome
from bsns.protocol.inference import (
    Close,
    Closed,
    Describe,
    Description,
    Failure,
    Mirror,
    Mirrored,
    Open,
    Opened,
    Ping,
    Pong,
    Reroute,
    Rerouted,
    Resize,
    Resized,
    Result,
    Step,
    There,
    Where,
)
from bsns.protocol.probing import Probe, Probed
from bsns.protocol.tensors import DTYPE_BYTES, TensorSpec

PROTOCOL_VERSION = 6
PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 1024 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_TENSORS = 16
MAX_DIMENSIONS = 4

Message = (
    Hello
    | Welcome
    | Refusal
    | Open
    | Opened
    | Step
    | Result
    | Failure
    | Reroute
    | Rerouted
    | Mirror
    | Mirrored
    | Resize
    | Resized
    | Where
    | There
    | Close
    | Closed
    | Ping
    | Pong
    | Describe
    | Description
    | Probe
    | Probed
)
Buffer = bytes | bytearray | memoryview

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frame as pieces ready for `writelines`; the tensors' buffers are passed through, not copied.

    Raises FrameTooLarge when our own message would break the limits, so that the peer is never sent one.
    """
    header = _encoder.encode(message)
    body_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
    check_lengths(len(header), body_bytes)
    return [PREFIX.pack(len(header), body_bytes) + header, *buffers]


def check_lengths(header_bytes: int, body_bytes: int) -> None:
    """Raises FrameTooLarge if either length of a frame's prefix is beyond the protocol's limits."""
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"frame header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
    if body_bytes > MAX_BODY_BYTES:
        raise FrameTooLarge(f"frame body of {body_bytes} bytes; the limit is {MAX_BODY_BYTES}")


def decode_header(header: Buffer) -> Message:
    """The message in a frame's header. Raises BadFrame."""
    try:
        return _decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"undecodable frame header: {error}") from None


def split_body(message: Message, body: memoryview) -> list[memoryview]:
    """The body cut into one view per tensor the message describes. Raises BadTensor if they do not fit together."""
    specs: Sequence[TensorSpec] = getattr(message, "tensors", ())
    if len(specs) > MAX_TENSORS:
        raise BadTensor(f"{len(specs)} tensors in one frame; the limit is {MAX_TENSORS}")
    views: list[memoryview] = []
    offset = 0
    for spec in specs:
        check_tensor(spec)
        views.append(body[offset : offset + spec.nbytes])
        offset += spec.nbytes
    if offset != body.nbytes:
        raise BadTensor(f"the tensors described take {offset} bytes, the frame's body has {body.nbytes}")
    return views


def check_tensor(spec: TensorSpec) -> None:
    """Raises BadTensor unless the description is of a known dtype and codec and adds up."""
    item_bytes = DTYPE_BYTES.get(spec.dtype)
    if item_bytes is None:
        raise BadTensor(f"tensor {spec.name!r} has unknown dtype {spec.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    if len(spec.shape) > MAX_DIMENSIONS or any(size < 0 for size in spec.shape):
        raise BadTensor(f"tensor {spec.name!r} has impossible shape {spec.shape}")
    codec = CODECS.get(spec.codec)
    if codec is None:
        raise BadTensor(f"tensor {spec.name!r} uses codec {spec.codec[:16]!r}, which this node does not know")
    if spec.codec == RAW:
        nbytes = math.prod(spec.shape) * item_bytes
    elif len(spec.shape) == 2 and spec.dtype in ACTIVATIONS:
        nbytes = spec.shape[0] * codec.row_bytes(spec.shape[1], spec.dtype)
    else:
        raise BadTensor(f"tensor {spec.name!r} of shape {spec.shape} {spec.dtype} cannot be in codec {spec.codec}")
    if spec.nbytes != nbytes:
        raise BadTensor(f"tensor {spec.name!r} of shape {spec.shape} {spec.dtype} cannot have {spec.nbytes} bytes")
