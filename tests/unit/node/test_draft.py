"""A draft model guesses what it would say itself, from whatever has been said."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from bsns.client.prompts import Prompts
from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.model.source import ModelSource, resolve
from bsns.node.draft import MOST_DRAFTED, Draft, Drafter


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def prompts(source: ModelSource) -> Prompts:
    return Prompts(source.path)


@pytest.fixture(scope="module")
def draft(source: ModelSource, prompts: Prompts) -> Draft:
    return Draft(source, prompts, dtype="bfloat16")


def ready(draft: Draft, step_s: float = 1.0) -> Drafter:
    """A guesser that knows what a step takes: so long that guesses are worth it."""
    drafter = draft.guesser()
    drafter.took(1, step_s, [1e-3])
    return drafter


def says(draft: Draft, text: list[int], count: int) -> list[int]:
    number, free = draft.open(len(text) + count)
    said: list[int] = []
    for _ in range(count):
        said.append(draft.next_token(number, 0, [*text, *said]))
    free()
    return said


def test_guesses_are_what_the_model_says(draft: Draft, prompts: Prompts) -> None:
    text = prompts.encode("The three longest rivers of the world are")
    drafter = ready(draft)
    first = drafter.guess(text, 50)
    assert 3 <= len(first) <= MOST_DRAFTED
    assert first == says(draft, text, len(first))
    drafter.took(1 + len(first), 1.1, [2e-3])
    drafter.checked(len(first), 2)
    other = [*text, *first[:2], first[2] + 1]
    then = drafter.guess(other, 50)
    assert then
    assert then == says(draft, other, len(then)), "what was wrong is forgotten"
    assert len(drafter.guess([*other, *then], 2)) <= 2


def test_it_goes_on_from_what_is_being_checked(draft: Draft, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = itertools.count()
    monkeypatch.setattr("bsns.node.draft.time", SimpleNamespace(perf_counter=lambda: next(milliseconds) / 1000))
    text = prompts.encode("The three longest rivers of the world are")
    drafter = ready(draft)
    for _ in range(3):
        drafter._drafted = True
        drafter.checked(10, 10)
    first = drafter.guess(text, 80)
    more = drafter.go_on(text, first, 80 - len(first))
    assert more
    assert [*first, *more] == says(draft, text, len(first) + len(more))
    drafter.checked(len(first) + 1, len(first) + 1)
    then = drafter.go_on([*text, *first, more[0]], more[1:], 40)
    assert [*first, *more, *then] == says(draft, text, len(first) + len(more) + len(then))
    assert drafter.go_on(text, first, 0) == []
    for _ in range(12):
        drafter.checked(len(first), 0)
    assert drafter.go_on(text, first, 50) == [], "not where it is mostly wrong"


def test_it_guesses_less_where_it_is_wrong_or_steps_are_short(draft: Draft, prompts: Prompts) -> None:
    text = prompts.encode("The three longest rivers of the world are")
    drafter = ready(draft)
    many = len(drafter.guess(text, 50))
    for _ in range(6):
        drafter.took(1 + many, 1.0, [1e-3])
        drafter.checked(many, 0)
    assert drafter.chance.now < 0.2
    assert len(drafter.guess(text, 50)) < many
    quick = ready(draft, 1e-6)
    quick.guess(text, 50)  # how long a guess takes is not known before
    assert quick.guess(text, 50) == []


def test_what_stood_before_needs_no_model(draft: Draft) -> None:
    drafter = ready(draft)
    assert drafter.guess([5, 6, 7, 8, 9, 5, 6, 7, 8], 3)[0] == 9
    assert drafter._number is None


def test_a_text_as_long_as_the_draft_model_can_read(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "context_tokens", 12)
    assert len(ready(draft).guess(list(range(100, 110)), 50)) <= 2
    assert ready(draft).guess(list(range(100, 113)), 50) == []


def test_its_cache_goes_with_the_answer(draft: Draft) -> None:
    drafter = ready(draft)
    assert drafter.guess(list(range(100, 110)), 50)
    assert len(draft) == 1
    del drafter
    gc.collect()
    assert len(draft) == 0


def test_many_answers_guess_less(draft: Draft) -> None:
    """What one answer's guesses take, all wait for."""
    drafter = ready(draft, 0.5)
    text = list(range(100, 110))
    alone = drafter.guess(text, 50)
    drafter._each_s = 0.02
    others = [draft.open(8) for _ in range(30)]
    try:
        assert drafter.guess(text, 50) == []
    finally:
        for _, free in others:
            free()
    assert 0 < len(drafter.guess(text, 50)) <= len(alone)


def test_without_memory_for_it_nothing_is_drafted(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = ready(draft)

    def full(*_: object) -> None:
        raise NotEnoughMemory("no")

    monkeypatch.setattr(draft._blocks, "open", full)
    assert drafter.guess(list(range(100, 110)), 50) == []
    monkeypatch.undo()
    assert drafter.guess(list(range(100, 110)), 50) == []
    assert drafter.guess([*range(100, 110), 5, 6, 7, 8, 9, 5, 6, 7, 8], 3)[0] == 9, "what stood before is guessed"


def test_other_tokens(source: ModelSource) -> None:
    other: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0}))
    with pytest.raises(BadOption, match="take a small one of its kind"):
        Draft(source, other, dtype="bfloat16")
