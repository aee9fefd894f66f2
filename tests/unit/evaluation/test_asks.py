"""Text asks in tokens, whole texts as asks, and which text has to be read for which."""

from __future__ import annotations

import math

import pytest

from bsns.evaluation.asks import Text, Tokens, covered, in_tokens, windows


def words(text: str) -> list[int]:
    """A tokenizer whose tokens are words with the space before them."""
    return [sum(map(ord, word)) for word in text.replace(" ", "\0 ").split("\0") if word]


@pytest.mark.parametrize("ask", [Text("the sea is", " blue today"), Text("the sea is ", "blue today")])
def test_a_space_belongs_to_the_word_after_it(ask: Text) -> None:
    assert in_tokens(ask, words, None, 100) == Tokens(tuple(words("the sea is")), tuple(words(" blue today")))


def test_a_tokenizer_that_joins_both_ends_leaves_the_last_token_to_the_continuation() -> None:
    assert in_tokens(Text("a b", "c"), words, None, 100) == Tokens(tuple(words("a")), tuple(words(" bc")))
    assert in_tokens(Text("ab", "c"), words, 7, 100) == Tokens((7,), tuple(words("abc")))


def test_an_empty_context_is_the_prefix() -> None:
    assert in_tokens(Text("", "blue sea"), words, 7, 100) == Tokens((7,), tuple(words("blue sea")))
    assert in_tokens(Text("", "x y"), lambda text: [7, *words(text)], 7, 100).continuation == tuple(words("x y"))


def test_a_long_context_loses_its_front() -> None:
    found = in_tokens(Text("a b c d e", " f g"), words, None, 4)
    assert found == Tokens(tuple(words(" c d e")), tuple(words(" f g")))
    assert len(found.read) == 4


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 10])
def test_windows_predict_every_token_once(length: int) -> None:
    text = list(range(10, 10 + length))
    asks = windows(text, 1, 4)
    assert [token for ask in asks for token in ask.continuation] == text
    assert len(asks) == math.ceil(length / 4)
    whole = [1, *text]
    for ask in asks:
        place = whole.index(ask.continuation[0])
        assert list(ask.context) == whole[place - len(ask.context) : place]
        assert len(ask.read) == min(4, length)  # the last window reads what is before it along


def test_without_a_prefix_the_first_token_is_not_predicted() -> None:
    assert windows([5, 6, 7], None, 8) == [Tokens((5,), (6, 7))]
    assert windows([5, 6, 7], 5, 8) == [Tokens((5,), (6, 7))]
    assert windows([5], None, 8) == []


def test_what_begins_another_text_is_not_read_for_itself() -> None:
    covers = covered([(1,), (1, 2), (1, 2, 3), (1, 3), (2,), (1, 2)])
    assert covers == {(1,): (1, 2, 3), (1, 2): (1, 2, 3), (1, 2, 3): (1, 2, 3), (1, 3): (1, 3), (2,): (2,)}
