"""A model's shape, as planning wants it: what each block weighs, caches and passes on, in the dtype it runs in."""

from __future__ import annotations

import math

from bsns.core.snapshot import ModelShape
from bsns.model.source import ModelSource
from bsns.protocol.tensors import DTYPE_BYTES


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
    )


def block_bytes(source: ModelSource, item_bytes: int) -> list[int]:
    """What each block's weights take in the dtype they are computed in, whatever they are stored in."""
    sizes = [0] * source.block_count
    for entry in source.checkpoint.tensors.values():
        if entry.block is not None:
            sizes[entry.block] += math.prod(entry.shape) * item_bytes
    return sizes
