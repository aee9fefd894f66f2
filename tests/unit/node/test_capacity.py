"""What a serving node decides about itself before it loads anything."""

from __future__ import annotations

from typing import cast

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, NotEnoughMemory, NotHere
from bsns.model.source import ModelSource
from bsns.node.capacity import ServeOptions, choose_blocks, choose_device, choose_dtype, rss_bytes

BLOCK_BYTES = [100 * 2**20] * 4


class Shape:
    """As much of a ModelSource as the choice looks at."""

    block_count = 4
    context_tokens = 128


def choose(blocks: str, room_mib: int) -> BlockRange:
    options = ServeOptions(blocks=blocks, memory_bytes=rss_bytes() + room_mib * 2**20)
    return choose_blocks(options, cast("ModelSource", Shape()), [], BLOCK_BYTES, kv_bytes=1, row_bytes=0)


def test_auto_takes_as_much_as_fits() -> None:
    assert choose("auto", 280) == BlockRange(0, 2)
    assert choose("auto", 1000) == BlockRange(0, 4)


def test_a_range_that_does_not_fit_says_how_much_would() -> None:
    assert choose("1:3", 280) == BlockRange(1, 3)
    with pytest.raises(NotEnoughMemory, match=r"blocks 0:3 do not fit .* 2 of them do"):
        choose("0:3", 280)


def test_dtype_follows_the_swarm() -> None:
    assert choose_dtype("auto", "cpu", ["float32", "bfloat16", "float32"]) == "float32"
    assert choose_dtype("float32", "cpu", []) == "float32"
    assert choose_dtype("auto", "cuda", []) == "bfloat16"
    with pytest.raises(NotHere, match="serves the model in bfloat16"):
        choose_dtype("float32", "cpu", ["bfloat16"])
    with pytest.raises(BadOption, match="float8"):
        choose_dtype("float8", "cpu", [])


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(BadOption, match=r"available: .*cpu"):
        choose_device("abacus")
