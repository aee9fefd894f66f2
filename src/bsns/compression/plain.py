"""The codecs of protocol.codecs in numpy: their definition, and what computes them where there are no kernels.

The kernels (native/codecs.h) give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsns.protocol.codecs import MOST_ROTATED, Codec

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_GREATEST = {
    "float32": np.float32(3.4028234663852886e38),
    "bfloat16": np.float32(3.3895313892515355e38),
    "float16": np.float32(65504.0),
}
_LARGE = np.float32(2.0**100)
"""Beyond it a rotation might overflow: such rows are rotated smaller."""
_MOST_SCALE = np.uint16(0x7F7F)
"""bfloat16's greatest: of four bits, beyond 10^38, a larger scale would be needed and is cut."""
_SHRINK, _GROW = np.float32(2.0**-32), np.float32(2.0**32)


class NotFinite(ValueError):
    """Numbers or scales that hold NaN or infinity, and the first row that does."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite")
        self.row = row


def numbers(data: Any, dtype: str, shape: tuple[int, int]) -> Floats:
    """The bytes of rows in a dtype as float32."""
    if dtype == "bfloat16":
        return _from_halves(np.frombuffer(data, "<u2").reshape(shape))
    return np.frombuffer(data, "<f4" if dtype == "float32" else "<f2").reshape(shape).astype(np.float32)


def in_dtype(rows: Floats, dtype: str) -> NDArray[Any]:
    """Rows in a dtype, whose greatest number they are cut to."""
    most = _GREATEST[dtype]
    cut = np.clip(rows, -most, most)
    if dtype == "bfloat16":
        return _to_halves(cut)
    return cut.astype("<f4" if dtype == "float32" else "<f2")


def encode(codec: Codec, rows: Floats) -> Bytes:
    """Rows (N, columns) as bytes (N, row bytes). Raises NotFinite."""
    _check_finite(rows)
    if codec.name == "bf16":
        return in_dtype(rows, "bfloat16").view(np.uint8)
    if codec.name == "int8-dyn":
        return _encode_dynamic(codec, rows)
    grow = np.ones((len(rows), 1), np.float32)
    if codec.rotated:
        large = np.abs(rows).max(axis=1, keepdims=True) > _LARGE
        grow[large] = _GROW
        rows = _rotated((rows * _signs(rows.shape[1])) * np.where(large, _SHRINK, np.float32(1)))
    kept = _scales(_absmax(rows, codec.block), 127.0 if codec.bits == 8 else 7.0)
    scales = np.repeat(_from_halves(kept), codec.block, axis=1)[:, : rows.shape[1]]
    codes = np.rint(np.divide(rows, scales, out=np.zeros_like(rows), where=scales > 0)).astype(np.int8)
    packed = codes.view(np.uint8) if codec.bits == 8 else _nibbles(codes)
    with np.errstate(over="ignore"):
        grown = np.minimum(_to_halves(_from_halves(kept) * grow), _MOST_SCALE)
    return np.hstack([grown.view(np.uint8), packed])


def decode(codec: Codec, coded: Bytes, columns: int) -> Floats:
    """Bytes (N, row bytes) as rows (N, columns). Raises NotFinite."""
    if codec.name == "bf16":
        return _from_halves(np.ascontiguousarray(coded).view("<u2"))
    if codec.name == "int8-dyn":
        return _decode_dynamic(codec, coded, columns)
    lies = 2 * -(-columns // codec.block)
    kept = np.ascontiguousarray(coded[:, :lies]).view("<u2")
    bad = ((kept & 0x8000) != 0) | ((kept & 0x7F80) == 0x7F80)
    _check_none(bad)
    scales = _from_halves(kept)
    large: NDArray[Any] = np.zeros((len(coded), 1), bool)
    if codec.rotated:
        large = np.any(scales > _LARGE / np.float32(127) / np.float32(32), axis=1, keepdims=True)
        scales = scales * np.where(large, _SHRINK, np.float32(1))
    packed = coded[:, lies:]
    codes = packed.view(np.int8) if codec.bits == 8 else _from_nibbles(packed, columns)
    with np.errstate(over="ignore"):  # what is too large is cut as it is kept
        rows = codes.astype(np.float32) * np.repeat(scales, codec.block, axis=1)[:, :columns]
        if codec.rotated:
            rows = _rotated(rows) * _signs(columns) * np.where(large, _GROW, np.float32(1))
    return rows


def _check_finite(rows: Floats) -> None:
    _check_none(~np.isfinite(rows))


def _check_none(bad: NDArray[np.bool_]) -> None:
    if bad.any():
        raise NotFinite(int(bad.any(axis=1).argmax()))


def _from_halves(halves: NDArray[np.uint16]) -> Floats:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _to_halves(values: Floats) -> NDArray[np.uint16]:
    """As bfloat16, to the nearest, ties to even; finite numbers only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype("<u2")


def _absmax(rows: Floats, block: int) -> Floats:
    """The greatest size in each block."""
    count, columns = rows.shape
    blocks = -(-columns // block)
    padded = np.zeros((count, blocks * block), np.float32)
    np.abs(rows, out=padded[:, :columns])
    found: Floats = padded.reshape(count, blocks, block).max(axis=2)
    return found


def _scales(absmax: Floats, codes: float) -> NDArray[np.uint16]:
    """As bfloat16, rounded up: no number then has a code beyond the last."""
    up = ((absmax / np.float32(codes)).view(np.uint32) + np.uint32(0xFFFF)) >> 16
    return np.where(absmax > 0, np.maximum(up, 1), 0).astype("<u2")


def _nibbles(codes: NDArray[np.int8]) -> Bytes:
    count, columns = codes.shape
    halves = np.zeros((count, columns + columns % 2), np.uint8)
    halves[:, :columns] = codes + 8
    packed: Bytes = halves[:, ::2] | halves[:, 1::2] << 4
    return packed


def _from_nibbles(packed: Bytes, columns: int) -> NDArray[np.int8]:
    halves = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), 2 * packed.shape[1])[:, :columns]
    return halves.astype(np.int8) - np.int8(8)


@functools.cache
def _signs(columns: int) -> Floats:
    """Which columns are negated before a rotation, so that no plain pattern of them ends up in one number."""
    mixed = np.arange(1, columns + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed ^= mixed >> 15
    return np.where(mixed * np.uint32(0x85EBCA77) >> 31, np.float32(-1), np.float32(1))


def _rotated(rows: Floats) -> Floats:
    """Each piece times its orthonormal Hadamard matrix, which is its own inverse."""
    rows = rows.copy()
    start, columns = 0, rows.shape[1]
    while start < columns:
        size = min(MOST_ROTATED, 1 << ((columns - start).bit_length() - 1))
        piece = rows[:, start : start + size]
        half = 1
        while half < size:
            pairs = piece.reshape(len(rows), size // half // 2, 2, half)
            piece = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
            half *= 2
        halvings, odd = divmod(size.bit_length() - 1, 2)
        norm = np.float32(2.0**-halvings) * (np.float32(0.70710678118654752) if odd else np.float32(1))
        rows[:, start : start + size] = piece.reshape(len(rows), size) * norm
        start += size
    return rows


@functools.cache
def dynamic_map() -> Floats:
    """The 256 entries, ascending: in the decade below 10^-d, 2^(6-d) numbers that divide it evenly, of either sign; and
    0 and 1."""
    sizes = [
        float(f"1e-{decade}") * (0.1 + (step + 0.5) * 0.9 / 2 ** (6 - decade))
        for decade in range(6, -1, -1)
        for step in range(2 ** (6 - decade))
    ]
    positive = np.array(sizes, np.float64).astype(np.float32)
    return np.concatenate([-positive[::-1], np.zeros(1, np.float32), positive, np.ones(1, np.float32)])


@functools.cache
def _between() -> Floats:
    """Halfway between the entries from 0 on."""
    sizes = dynamic_map()[127:].astype(np.float64)
    return ((sizes[:-1] + sizes[1:]) / 2).astype(np.float32)


def _encode_dynamic(codec: Codec, rows: Floats) -> Bytes:
    absmax = _absmax(rows, codec.block)
    spread = np.repeat(absmax, codec.block, axis=1)[:, : rows.shape[1]]
    sizes = np.divide(np.abs(rows), spread, out=np.zeros_like(rows), where=spread > 0)
    index = np.searchsorted(_between(), sizes, side="left")
    codes = np.where(rows < 0, 127 - np.minimum(index, 127), 127 + index).astype(np.uint8)
    return np.hstack([absmax.astype("<f4").view(np.uint8), codes])


def _decode_dynamic(codec: Codec, coded: Bytes, columns: int) -> Floats:
    lies = 4 * -(-columns // codec.block)
    absmax = np.ascontiguousarray(coded[:, :lies]).view("<f4")
    _check_none(~np.isfinite(absmax) | (absmax < 0))
    rows: Floats = dynamic_map()[coded[:, lies:]] * np.repeat(absmax, codec.block, axis=1)[:, :columns]
    return rows
