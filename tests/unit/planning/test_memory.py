"""How many blocks fit, and what a stage takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import NotEnoughMemory
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import ModelShape, NodeView
from bsns.planning.memory import fitting_blocks, stage_memory

MIB = 2**20


@pytest.mark.parametrize(
    ("memory", "blocks", "cache_tokens", "expected"),
    [
        (1000, [10] * 30, 0, 30),
        (110, [10] * 30, 0, 1),
        (119, [10] * 30, 0, 1),
        (150, [10] * 30, 0, 5),
        (150, [10] * 30, 5, 3),  # 5 MiB of cache a block
        (150, [10, 10, 30, 10], 0, 3),  # any three neighbours weigh at most 50
    ],
)
def test_fitting(memory: int, blocks: list[int], cache_tokens: int, expected: int) -> None:
    assert fitting_blocks(memory * MIB, [b * MIB for b in blocks], MIB, cache_tokens, 100 * MIB) == expected


def test_not_even_one() -> None:
    with pytest.raises(NotEnoughMemory, match=r"one block needs 115 MiB .*only 114 MiB"):
        fitting_blocks(114 * MIB, [10 * MIB] * 3, MIB, 5, 100 * MIB)


def test_what_a_stage_will_take() -> None:
    shape = ModelShape(
        ModelId("m"),
        "m",
        (100, 200, 300),
        kv_bytes_per_token_per_block=4,
        hidden_bytes=10,
        quantised_block_bytes={"int8": (50, 100, 150)},
        quantised_kv_bytes={"int8": 3},
    )
    node = NodeView(PeerId("a"), 0.001, 10**6, baseline_bytes=7)
    use = stage_memory(BlockRange(1, 3), node, shape, cache_tokens=20)
    assert (use.baseline_bytes, use.weight_bytes, use.promised_bytes) == (7, 500, 20 * (2 * 4 + 10))
    assert use.full_bytes == 7 + 500 + 360
    fewer = stage_memory(BlockRange(1, 3), replace(node, quant="int8", kv="int8"), shape, cache_tokens=20)
    assert (fewer.weight_bytes, fewer.promised_bytes) == (250, 20 * (2 * 3 + 10))
    unknown = stage_memory(BlockRange(0, 1), replace(node, quant="int2"), shape, cache_tokens=0)
    assert unknown.weight_bytes == 100
