"""Who takes which blocks without an orchestrator: a joining node goes where the swarm is weakest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption


def block_throughputs(block_count: int, holders: Iterable[tuple[BlockRange, float]]) -> list[float]:
    """Throughput of each block: the sum over its holders, in their own unit."""
    throughputs = [0.0] * block_count
    for blocks, throughput in holders:
        for block in range(blocks.start, min(blocks.end, block_count)):
            throughputs[block] += throughput
    return throughputs


def choose_range(block_count: int, holders: Iterable[tuple[BlockRange, float]], max_blocks: int) -> BlockRange:
    """The range a joining node should take: the K blocks whose sorted throughputs are least, lexicographically.

    K is `max_blocks` or the whole model; the first such range wins. From Petals (arXiv 2312.08361, §3.2). Raises
    BadOption.
    """
    if max_blocks < 1:
        raise BadOption(f"max_blocks is {max_blocks}; a node needs at least 1 block")
    return weakest_range(block_throughputs(block_count, holders), max_blocks)


def weakest_range(throughputs: Sequence[float], max_blocks: int) -> BlockRange:
    """The same, of blocks whose throughputs are known."""
    size = min(max_blocks, len(throughputs))
    start = min(range(len(throughputs) - size + 1), key=lambda i: sorted(throughputs[i : i + size]))
    return BlockRange(start, start + size)


def equal_split(block_count: int, parts: int) -> list[BlockRange]:
    """The model in `parts` ranges whose sizes differ by at most one, larger first. Raises BadOption."""
    if not 1 <= parts <= block_count:
        raise BadOption(f"{block_count} blocks cannot be split in {parts} parts; give 1 to {block_count}")
    size, larger = divmod(block_count, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return [BlockRange(start, end) for start, end in pairwise(starts)]
