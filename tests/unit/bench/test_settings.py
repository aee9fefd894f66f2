"""The random swarms that are emulated."""

from __future__ import annotations

import pytest

from bsns.bench.settings import BLOCK_TIMES_S, DELAYS_S, LARGEST, PLENTY, RATES_BYTES_PER_S, Setting, draw_settings
from bsns.core.ids import ModelId
from bsns.core.snapshot import ModelShape

SHAPE = ModelShape(ModelId("m"), "m", (7_000_000,) * 30, 768, 1152)


def drawn(seed: int, count: int = 20) -> list[Setting]:
    return list(draw_settings(SHAPE, count=count, nodes=6, cache_tokens=1024, seed=seed))


@pytest.mark.parametrize("setting", drawn(3), ids=lambda setting: str(setting.number))
def test_nodes_are_unequal_and_none_holds_all(setting: Setting) -> None:
    need = 7_000_000 + 768 * 1024
    assert (min(setting.block_time_s), max(setting.block_time_s)) == pytest.approx(BLOCK_TIMES_S)
    room = [size // need for size in setting.memory_bytes]
    assert min(room) >= 5
    assert max(room) <= LARGEST * 30
    assert PLENTY[0] * 30 - 3 <= sum(room) <= PLENTY[1] * 30 + 9  # rounded, and no less than an equal share each


@pytest.mark.parametrize("setting", drawn(4), ids=lambda setting: str(setting.number))
def test_every_way_is_there_and_the_same_both_ways(setting: Setting) -> None:
    assert set(setting.ways) == {(a, b) for a in range(7) for b in range(7) if a != b}
    for (a, b), way in setting.ways.items():
        assert setting.ways[b, a] == way
        assert DELAYS_S[0] <= way.delay_s <= DELAYS_S[1]
        assert RATES_BYTES_PER_S[0] <= way.bytes_per_s <= RATES_BYTES_PER_S[1]


def test_a_seed_says_it_all() -> None:
    assert drawn(1, 3) == drawn(1, 3)
    assert drawn(1, 3) == drawn(1, 5)[:3]
    assert drawn(1, 1) != drawn(2, 1)


def test_a_model_of_few_blocks() -> None:
    small = ModelShape(ModelId("s"), "s", (1000,) * 4, 8, 128)
    (setting,) = draw_settings(small, count=1, nodes=4, cache_tokens=16, seed=0)
    assert all(1 <= size // (1000 + 8 * 16) <= 3 for size in setting.memory_bytes)
