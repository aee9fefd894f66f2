"""Codecs of activations on the wire: their names, their layouts, and how far they may be off.

Every row is encoded by itself, so that rows can be cut and joined as they are without a codec:

    raw        the numbers in the session's dtype
    bf16       the numbers in bfloat16
    int8       a scale for each 64 numbers (bfloat16, rounded up), then a signed byte for each number
    int8-dyn   a float32 for each 4,096 numbers, the greatest of their sizes, then a byte for each number: an entry of
               the signed dynamic map of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022)
    int8-rot   as int8, of the row rotated by Hadamard matrices: a single great number then spoils no others
    int4       a scale for each 32 numbers and four bits for each number, of the rotated row

Little-endian; the lower half of a byte comes first. A rotation takes the row in pieces of the greatest power of two
that fits, at most 512, its columns' signs flipped as bsns.compression.plain says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bsns.protocol.tensors import DTYPE_BYTES, TensorSpec

RAW = "raw"
ACTIVATIONS = ("float32", "bfloat16", "float16")
"""Dtypes that codecs take."""
MOST_ROTATED = 512
_ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""How far a number may be off, relative to itself, once it is kept in a dtype."""
_UP = 1 + 2.0**-7
"""How much a scale may grow as it is rounded up to bfloat16."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How rows of activations are written."""

    name: str
    block: int
    """Numbers that share a scale; 0: there are no scales."""
    scale_bytes: int
    bits: int
    """Of each number."""
    step: float
    """How far a number may be off before it is rounded to its dtype, relative to the greatest of its block (or to
    itself, where there are no blocks); of a codec that rotates, a number of the rotated row."""
    rotated: bool = False

    def row_bytes(self, columns: int, dtype: str) -> int:
        """Bytes of a row of so many numbers; `dtype` is the session's."""
        if self.name == RAW:
            return columns * DTYPE_BYTES[dtype]
        scales = -(-columns // self.block) if self.block else 0
        return scales * self.scale_bytes + -(-columns * self.bits // 8)

    def error_bound(self, columns: int, dtype: str) -> float:
        """How far, at most, a row comes back off, relative to it, in the Euclidean norm.

        A block's error is at most `step` times its greatest number in each of its places, and that number squared is at
        most the sum of its squares; a rotation keeps both norms. Numbers below 2^-90 are off by as much at most; int4
        says nothing of rows beyond 10^38.
        """
        return self.step * math.sqrt(min(columns, self.block or 1)) * 1.001 + _ROUNDING[dtype]


CODECS = {
    codec.name: codec
    for codec in (
        Codec(RAW, 0, 0, 0, 0.0),
        Codec("bf16", 0, 0, 16, 2.0**-8),
        Codec("int8", 64, 2, 8, _UP / 254),
        Codec("int8-dyn", 4096, 4, 8, 0.9 / 128 * 1.0001),
        Codec("int8-rot", 64, 2, 8, _UP / 254, rotated=True),
        Codec("int4", 32, 2, 4, _UP / 14, rotated=True),
    )
}


def coded(name: str, dtype: str, shape: tuple[int, int], codec: str) -> TensorSpec:
    """The description of rows in a codec."""
    rows, columns = shape
    return TensorSpec(name, dtype, shape, rows * CODECS[codec].row_bytes(columns, dtype), codec)
