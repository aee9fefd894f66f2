"""The model of hashes: whatever goes wrong on the way shows in the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.simulator.model import HashEnds, embedding, expected_tokens, pass_through

BLOCKS = BlockRange(0, 3)
ROWS = [embedding(token, at) for at, token in enumerate((5, 9, 9, 2))]


def test_ranges_that_follow_one_another_are_the_whole() -> None:
    whole = pass_through(BlockRange(0, 6), ROWS, 0, [])
    half = pass_through(BlockRange(0, 2), ROWS, 0, [])
    assert pass_through(BlockRange(2, 6), half, 0, []) == whole


def test_a_step_overwrites_everything_from_its_position_on() -> None:
    blocks, cache = BlockRange(0, 3), []
    whole = pass_through(blocks, ROWS, 0, cache)
    assert pass_through(blocks, ROWS[2:], 2, cache) == whole[2:]
    assert pass_through(blocks, ROWS[3:], 3, cache) == whole[3:]
    assert pass_through(blocks, ROWS[1:2], 1, cache) == whole[1:2]
    assert len(cache) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda cache: cache.pop(),  # a row is missing
        lambda cache: pass_through(BLOCKS, ROWS[2:3], 3, cache),  # one came twice
        lambda cache: cache.__setitem__(-1, [1, 2, 3]),  # the cache is another's
    ],
)
def test_a_cache_that_is_wrong_gives_another_row(wrong: Callable[[list[list[int]]], object]) -> None:
    cache: list[list[int]] = []
    pass_through(BLOCKS, ROWS[:3], 0, cache)
    right = pass_through(BLOCKS, ROWS[3:], 3, [list(chains) for chains in cache])
    wrong(cache)
    assert pass_through(BLOCKS, ROWS[3:], len(cache), cache) != right


def test_answers_depend_on_everything() -> None:
    options = SamplingOptions(max_tokens=12)
    said = expected_tokens([1, 2, 3], options, 8)
    assert len(said) == 12
    assert expected_tokens([1, 2, 3], options, 8) == said
    assert expected_tokens([1, 2, 4], options, 8) != said
    assert expected_tokens([1, 2, 3], options, 7) != said
    drawn = SamplingOptions(max_tokens=12, temperature=0.8, seed=1)
    assert expected_tokens([1, 2, 3], drawn, 8) != said


def test_logits_are_those_of_the_row() -> None:
    ends = HashEnds()
    scores_NV = ends.scores([7, 8])
    assert scores_NV.shape == (2, ends.vocab_size)
    assert float(scores_NV.min()) >= 0
    assert float(scores_NV.max()) <= 8
    assert (scores_NV[0] != scores_NV[1]).any()
