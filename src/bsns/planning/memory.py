"""How many blocks a node's memory holds, and what a stage will take of it."""

from __future__ import annotations

from collections.abc import Sequence

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.core.memory import MemoryUse
from bsns.core.snapshot import ModelShape, NodeView


def fitting_blocks(
    memory_bytes: int,
    block_bytes: Sequence[int],
    kv_bytes_per_token_per_block: int,
    cache_tokens: int,
    baseline_bytes: int,
) -> int:
    """The most neighbouring blocks that fit, wherever their range begins, each with its cache of `cache_tokens`.

    `baseline_bytes` is what the process takes without any block. Raises NotEnoughMemory, saying how much one block
    needs.
    """
    if not block_bytes:
        raise BadOption("a model has at least one block")
    cache_bytes = kv_bytes_per_token_per_block * cache_tokens
    one_bytes = baseline_bytes + max(block_bytes) + cache_bytes
    if one_bytes > memory_bytes:
        raise NotEnoughMemory(
            f"one block needs {_mib(one_bytes)} ({_mib(baseline_bytes)} for the process, {_mib(max(block_bytes))} of "
            f"weights, {_mib(cache_bytes)} of cache for {cache_tokens} tokens) but only {_mib(memory_bytes)} may be "
            "used; give more memory or fewer cache tokens"
        )
    sums = [0]
    for size in block_bytes:
        sums.append(sums[-1] + size)
    fitting = 1
    for count in range(2, len(block_bytes) + 1):
        heaviest = max(sums[start + count] - sums[start] for start in range(len(block_bytes) - count + 1))
        if baseline_bytes + heaviest + count * cache_bytes > memory_bytes:
            break
        fitting = count
    return fitting


def stage_memory(blocks: BlockRange, node: NodeView, shape: ModelShape, cache_tokens: int) -> MemoryUse:
    """What a node's process will take with these blocks and so much cache, in the precision that it keeps them in.

    Where the shape does not say what that is, in the precision that they are computed in.
    """
    block_bytes = shape.quantised_block_bytes.get(node.quant, shape.block_bytes)
    kv_bytes = shape.quantised_kv_bytes.get(node.kv, shape.kv_bytes_per_token_per_block)
    return MemoryUse(
        baseline_bytes=node.baseline_bytes,
        weight_bytes=sum(block_bytes[block] for block in blocks),
        promised_bytes=cache_tokens * (kv_bytes * len(blocks) + shape.hidden_bytes),
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
