"""A task is taken to its end, and an interrupted one goes on where it was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bsns.core.errors import BadOption, PeerLost
from bsns.evaluation.asks import Ask, Encode, Score, Scored, Tokens
from bsns.evaluation.journal import Journal
from bsns.evaluation.results import TaskResult
from bsns.evaluation.runner import run_task
from bsns.evaluation.tasks.task import Item, Kind, Verdict, best


class Even:
    """Questions of which every second one is answered rightly by `Stub`."""

    metrics: Mapping[str, Kind] = {"acc": "accuracy"}

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        return [Item((Tokens((number,), (0,)), Tokens((number,), (1,)))) for number in range(limit or 10)]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        choice = best([score.logprob for score in scores])
        return Verdict({"acc": float(choice == item.right)}, {"acc": (choice,)})


class Stub:
    """A scorer that prefers the choice a question's number is odd or even for; fails when it has answered enough."""

    def __init__(self, enough: int = 1000) -> None:
        self.enough = enough
        self.asked: list[int] = []

    async def score(self, asks: Sequence[Ask]) -> Scored:
        await asyncio.sleep(0)
        if len(self.asked) >= self.enough:
            raise PeerLost("gone")
        first = asks[0]
        assert isinstance(first, Tokens)
        number = first.context[0]
        self.asked.append(number)
        scores = [Score(-1.0 - (place != number % 2), (0,), False) for place in range(len(asks))]
        return Scored(tuple(scores), 2, 2)


async def run(journal: Journal, scorer: Stub, limit: int | None = None) -> TaskResult:
    task = Even()
    return await run_task("even", task, task.items(limit, lambda text: []), scorer, journal, at_once=3)


async def test_items_are_judged_and_counted() -> None:
    with Journal(None, "s") as journal:
        found = await run(journal, Stub())
    assert found.n == 10
    assert [item.choices["acc"] for item in found.items] == [(number % 2,) for number in range(10)]
    assert found.metrics["acc"].value == 0.5
    assert found.metrics["acc"].stderr == pytest.approx((0.5 * 0.5 / 9) ** 0.5)
    assert (found.tokens, found.read_tokens) == (20, 20)
    assert found.items[0].logprobs == (-1.0, -2.0)
    assert journal.file is None


async def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    with Journal(output, "s") as journal, pytest.raises(PeerLost):
        await run(journal, Stub(enough=4))
    assert len(journal) == 4
    kept = output.with_name("a.json.partial")
    assert len(kept.read_bytes().splitlines()) == 4
    again = Stub()
    told: list[tuple[int, int]] = []
    with Journal(output, "s") as journal:
        task = Even()
        items = task.items(None, lambda text: [])
        found = await run_task(
            "even", task, items, again, journal, at_once=2, told=lambda done, all: told.append((done, all))
        )
        journal.finish()
    assert sorted(again.asked) == [4, 5, 6, 7, 8, 9]
    assert told == [(done, 10) for done in range(4, 11)]
    with Journal(None, "s") as fresh:
        whole = await run(fresh, Stub())
    assert [item.values for item in found.items] == [item.values for item in whole.items]
    assert found.metrics == whole.metrics
    assert not kept.exists()


async def test_other_settings_or_questions_start_anew(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    with Journal(output, "s") as journal:
        await run(journal, Stub(), limit=4)
    with Journal(output, "other") as journal:
        scorer = Stub()
        await run(journal, scorer, limit=4)
        assert sorted(scorer.asked) == [0, 1, 2, 3]
    with Journal(output, "s") as journal:
        assert journal.find("even", Even().items(1, lambda text: [])[0].name(0)) is not None
        assert journal.find("odd", Even().items(1, lambda text: [])[0].name(0)) is None


async def test_half_a_line_of_a_killed_process_is_dropped(tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    with Journal(output, "s") as journal:
        await run(journal, Stub(), limit=3)
    kept = output.with_name("a.json.partial")
    kept.write_bytes(kept.read_bytes()[:-10])
    for _ in range(2):
        with Journal(output, "s") as journal:
            scorer = Stub()
            await run(journal, scorer, limit=3)
            lines = kept.read_bytes().splitlines()
    assert scorer.asked == []
    assert [json.loads(line)["task"] for line in lines] == ["even"] * 3


@pytest.mark.parametrize("text", [b"nonsense\n", b'{"task": "even"}\n', b"\xff\xfe\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "a.json.partial"
    file.write_bytes(text)
    with pytest.raises(BadOption, match=r"line 1 of .*a\.json\.partial is no item"), Journal(tmp_path / "a.json", "s"):
        pass
    assert file.read_bytes() == text


def test_a_place_where_nothing_can_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="cannot be written"), Journal(tmp_path / "none" / "a.json", "s"):
        pass
