"""Block ranges: what they cover, what is missing, and what is no range."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BadRange


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 2), (-1, 2)])
def test_empty_and_negative_ranges_are_refused(start: int, end: int) -> None:
    with pytest.raises(BadRange):
        BlockRange(start, end)


def test_a_range_is_half_open() -> None:
    blocks = BlockRange(2, 5)
    assert (len(blocks), list(blocks), str(blocks)) == (3, [2, 3, 4], "2:5")
    assert blocks.covers(BlockRange(2, 3))
    assert not blocks.covers(BlockRange(1, 3))
    assert not blocks.covers(BlockRange(4, 6))


def test_ranges_are_read_as_they_are_written() -> None:
    assert BlockRange.parse("0:10", 30) == BlockRange(0, 10)
    assert BlockRange.parse("7", 30) == BlockRange(7, 8)
    for text in ("", ":", "x", "1:", "5:2", "0:31", "1:2:3"):
        with pytest.raises(BadRange):
            BlockRange.parse(text, 30)


ranges = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda pair: pair[0] < pair[1])


@given(st.lists(ranges, max_size=6))
def test_missing_blocks_are_exactly_those_nobody_covers(held: list[tuple[int, int]]) -> None:
    gaps = missing_blocks([BlockRange(*pair) for pair in held], 12)
    covered = {block for start, end in held for block in range(start, end)}
    assert [block for gap in gaps for block in gap] == sorted(set(range(12)) - covered)
    assert all(gap.end < after.start for gap, after in itertools.pairwise(gaps))
