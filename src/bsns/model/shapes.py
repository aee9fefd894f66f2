"""A model's shape, as planning wants it: what each block weighs, caches and passes on, in the dtype it runs in."""

from __future__ import annotations

import math

from bsns.core.snapshot import ModelShape
from bsns.model.source import ModelSource
from bsns.protocol.tensors import DTYPE_BYTES

_QUANTISED = {"int8": (8.0, 8), "int4": (4.25, 4)}
"""Bits of a weight, and bytes beside each row: see native/matrix.h."""


def shape_of(source: ModelSource, dtype: str) -> ModelShape:
    """The shape of a model on this machine. Every block counts as the same work: nodes are timed by their average."""
    item_bytes = DTYPE_BYTES[dtype]
    return ModelShape(
        model=source.model_id,
        name=source.name,
        block_bytes=tuple(block_bytes(source, item_bytes)),
        kv_bytes_per_token_per_block=source.kv_bytes_per_token_per_block(item_bytes),
        hidden_bytes=source.hidden_size * item_bytes,
        dtype=dtype,
        quantised_block_bytes={quant: tuple(block_bytes(source, item_bytes, quant)) for quant in _QUANTISED},
        quantised_kv_bytes={"int8": source.kv_bytes_per_token_per_block(item_bytes, "int8")},
    )


def block_bytes(source: ModelSource, item_bytes: int, quant: str = "none") -> list[int]:
    """What each block's weights take in the dtype they are computed in, whatever they are stored in.

    `quant`: where matrices are kept in fewer bits, `int8` or `int4`, with what scales them back.
    """
    sizes = [0] * source.block_count
    for entry in source.checkpoint.tensors.values():
        if entry.block is None:
            continue
        numbers = math.prod(entry.shape)
        if quant == "none" or len(entry.shape) < 2:
            sizes[entry.block] += numbers * item_bytes
        else:
            bits, row_bytes = _QUANTISED[quant]
            sizes[entry.block] += math.ceil(numbers * bits / 8) + numbers // entry.shape[-1] * row_bytes
    return sizes
