"""Joining without an orchestrator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BadOption
from bsns.planning.joining import block_throughputs, choose_range, equal_split


@pytest.mark.parametrize(
    ("holders", "max_blocks", "expected"),
    [
        ([], 4, BlockRange(0, 4)),
        ([], 99, BlockRange(0, 10)),
        ([(BlockRange(0, 4), 1.0)], 4, BlockRange(4, 8)),
        ([(BlockRange(0, 4), 1.0), (BlockRange(4, 8), 1.0)], 4, BlockRange(6, 10)),
        ([(BlockRange(0, 5), 1.0), (BlockRange(5, 10), 2.0)], 5, BlockRange(0, 5)),
        ([(BlockRange(0, 5), 3.0), (BlockRange(5, 10), 2.0)], 1, BlockRange(5, 6)),
    ],
)
def test_goes_where_the_swarm_is_weakest(
    holders: list[tuple[BlockRange, float]], max_blocks: int, expected: BlockRange
) -> None:
    assert choose_range(10, holders, max_blocks) == expected


ranges = st.integers(0, 11).flatmap(lambda s: st.integers(s + 1, 12).map(lambda e: BlockRange(s, e)))


@given(st.lists(st.tuples(ranges, st.sampled_from([0.5, 1.0, 2.0])), max_size=6), st.integers(1, 15))
def test_no_range_has_a_weaker_block(holders: list[tuple[BlockRange, float]], max_blocks: int) -> None:
    chosen = choose_range(12, holders, max_blocks)
    throughputs = block_throughputs(12, holders)
    assert len(chosen) == min(max_blocks, 12)
    assert min(throughputs[chosen.start : chosen.end]) == min(throughputs)


@given(st.integers(1, 40), st.data())
def test_equal_split_covers(block_count: int, data: st.DataObject) -> None:
    split = equal_split(block_count, data.draw(st.integers(1, block_count)))
    assert missing_blocks(split, block_count) == ()
    assert sum(map(len, split)) == block_count
    assert max(map(len, split)) - min(map(len, split)) <= 1


def test_bad_options() -> None:
    with pytest.raises(BadOption):
        equal_split(3, 4)
    with pytest.raises(BadOption):
        equal_split(3, 0)
    with pytest.raises(BadOption):
        choose_range(3, [], 0)
