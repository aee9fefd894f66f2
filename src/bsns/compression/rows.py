"""Rows of activations in a codec and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsns.compression import plain
from bsns.compression.plain import NotFinite
from bsns.native.library import CODECS as NATIVE_CODECS
from bsns.native.library import Library, native_library
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.frames import Buffer

__all__ = ["NotFinite", "decode", "encode"]

_NATIVE_DTYPES = ("float32", "bfloat16")


def encode(codec: str, data: Buffer, dtype: str, columns: int) -> Buffer:
    """The bytes of rows of `columns` numbers in a dtype, in a codec; of `raw` the same bytes. Raises NotFinite."""
    if codec == RAW:
        return data
    described = CODECS[codec]
    rows = memoryview(data).nbytes // _raw_bytes(columns, dtype)
    library = _library(codec, dtype)
    if library is None:
        return _memory(plain.encode(described, plain.numbers(data, dtype, (rows, columns))))
    row_bytes = described.row_bytes(columns, dtype)
    source, target = np.frombuffer(data, np.uint8), np.empty(rows * row_bytes, np.uint8)
    bad = library.encode(codec, rows, columns, dtype, source.ctypes.data, target.ctypes.data, row_bytes)
    if bad is not None:
        raise NotFinite(bad)
    return memoryview(target)  # type: ignore[arg-type]


def decode(codec: str, data: Buffer, dtype: str, columns: int) -> Buffer:
    """The opposite of `encode`. Raises NotFinite for scales that no encoder writes."""
    if codec == RAW:
        return data
    described = CODECS[codec]
    row_bytes = described.row_bytes(columns, dtype)
    rows = memoryview(data).nbytes // row_bytes
    library = _library(codec, dtype)
    if library is None:
        coded = np.frombuffer(data, np.uint8).reshape(rows, row_bytes)
        return _memory(plain.in_dtype(plain.decode(described, coded, columns), dtype))
    source, target = np.frombuffer(data, np.uint8), np.empty(rows * _raw_bytes(columns, dtype), np.uint8)
    bad = library.decode(codec, rows, columns, dtype, source.ctypes.data, target.ctypes.data, row_bytes)
    if bad is not None:
        raise NotFinite(bad)
    return memoryview(target)  # type: ignore[arg-type]


def _raw_bytes(columns: int, dtype: str) -> int:
    return CODECS[RAW].row_bytes(columns, dtype)


def _library(codec: str, dtype: str) -> Library | None:
    if codec not in NATIVE_CODECS or dtype not in _NATIVE_DTYPES:
        return None
    library = native_library()
    return library if isinstance(library, Library) else None


def _memory(array: NDArray[Any]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
