"""How a message describes the tensors in its frame's body."""

from __future__ import annotations

import math

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
"""Dtypes that may travel, with their size; little-endian, C order."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: its name, element type, shape, codec and length in the body."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    codec: str = "raw"

    @classmethod
    def raw(cls, name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        return cls(name, dtype, shape, math.prod(shape) * DTYPE_BYTES[dtype])
