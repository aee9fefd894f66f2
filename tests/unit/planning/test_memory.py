"""How many blocks fit."""

from __future__ import annotations

import pytest

from bsns.core.errors import NotEnoughMemory
from bsns.planning.memory import fitting_blocks

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
