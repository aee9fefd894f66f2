"""Log-probabilities over a swarm are those of the library's model in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf
from tiny_models import prompt, reference

from bsns.core.errors import BadOption, PeerFailed, PeerLost, PromptTooLong
from bsns.evaluation import scoring
from bsns.evaluation.asks import Ask, Text, Tokens
from bsns.evaluation.crew import each
from bsns.evaluation.scoring import SwarmScorer


def no_text(text: str) -> list[int]:
    raise AssertionError("these asks are tokens already")


def ask(context: int, continuation: int, seed: int = 7) -> Tokens:
    tokens = prompt(context + continuation, seed)
    return Tokens(tuple(tokens[:context]), tuple(tokens[context:]))


class Reads:
    """A client whose logits are made here: token t follows token t − 1 with a share that is known. Fails at first."""

    context_tokens = 64

    def __init__(self, failures: Sequence[Exception] = (), chunk: int = 3, worst: float = 0.0) -> None:
        self.failures = list(failures)
        self.chunk = chunk
        self.worst = worst
        self.texts: list[tuple[int, ...]] = []

    async def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]:
        self.texts.append(tuple(tokens))
        for chunk in range(start, len(tokens), self.chunk):
            part = torch.tensor(tokens[chunk : chunk + self.chunk])
            yield torch.nn.functional.one_hot((part + 1) % 8, 8).float() + self.worst
            if self.failures:
                raise self.failures.pop(0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_log_probabilities_are_the_librarys(
    family: str, tiny_model: Callable[[str], Path], shelf: StageShelf, swarm: MemorySwarm
) -> None:
    path = tiny_model(family)
    count = 7 if family == "gemma3" else 5
    await swarm.add_stages(shelf.stages(path, (0, 2, count)), block_count=count)
    scorer = SwarmScorer(swarm.client(shelf.ends(path)), no_text)
    # over the edges of chunks (128 rows); a continuation of one token; beginnings of each other
    asks = [ask(3, 5), ask(120, 20), ask(128, 1), ask(1, 199), Tokens((5,), (6,)), ask(40, 30, seed=9), ask(3, 4)]
    found: dict[int, float] = {}
    greedy: dict[int, bool] = {}

    async def score(number: int) -> None:
        (one,) = (await scorer.score([asks[number]])).scores
        found[number], greedy[number] = one.logprob, one.greedy

    await each(range(len(asks)), score, at_once=4)
    together = await scorer.score(asks)
    model = reference(path)
    for number, each_ask in enumerate(asks):
        with torch.inference_mode():
            logits_TV = model(torch.tensor([each_ask.read])).logits[0].float()
        rows_NV = logits_TV[len(each_ask.context) - 1 :].log_softmax(-1)
        expected = float(rows_NV.gather(1, torch.tensor(each_ask.continuation)[:, None]).sum())
        assert found[number] == pytest.approx(expected, abs=1e-4)
        assert together.scores[number].logprob == pytest.approx(expected, abs=1e-4)
        assert together.scores[number].likeliest == tuple(rows_NV.argmax(-1).tolist())
        assert greedy[number] == (together.scores[number].likeliest == each_ask.continuation)
    assert together.tokens == sum(len(one.continuation) for one in asks)


async def test_endings_that_begin_alike_are_read_once() -> None:
    reads = Reads()
    context = (1, 2, 3)
    asks: list[Ask] = [Tokens(context, (4,)), Tokens(context, (7,)), Tokens(context, (4, 5)), Tokens(context, (6, 6))]
    scored = await SwarmScorer(reads, no_text).score(asks)
    assert sorted(reads.texts) == [(1, 2, 3, 4), (1, 2, 3, 6)]
    assert (scored.tokens, scored.read_tokens) == (6, 8)
    right, wrong = (1 - torch.logsumexp(torch.tensor([1.0, *[0.0] * 7]), 0) - off for off in (0, 1))
    expected = [right, wrong, right + right, wrong + wrong]
    assert [score.logprob for score in scored.scores] == pytest.approx([float(value) for value in expected])
    assert [score.greedy for score in scored.scores] == [True, False, True, False]


async def test_a_text_is_read_again_where_the_swarm_lost_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AGAIN_S", 0.0)
    reads, plain = Reads([PeerLost("gone"), PeerLost("gone")]), Reads()
    asks = [Tokens((1,), (2, 3, 4, 5))]
    assert await SwarmScorer(reads, no_text).score(asks) == await SwarmScorer(plain, no_text).score(asks)
    assert len(reads.texts) == 3
    with pytest.raises(PeerLost):
        await SwarmScorer(Reads([PeerLost("gone")] * 3), no_text).score(asks)


async def test_a_users_mistake_is_not_tried_again() -> None:
    reads = Reads([PromptTooLong("too long")])
    with pytest.raises(PromptTooLong):
        await SwarmScorer(reads, no_text).score([Tokens((1,), (2, 3, 4, 5))])
    assert len(reads.texts) == 1


async def test_what_is_no_number_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AGAIN_S", 0.0)
    with pytest.raises(PeerFailed, match="not numbers"):
        await SwarmScorer(Reads(worst=float("nan")), no_text).score([Tokens((1,), (2,))])


async def test_nothing_to_score_is_told() -> None:
    with pytest.raises(BadOption, match="nothing to score"):
        await SwarmScorer(Reads(), lambda text: []).score([Text("", "")])


async def test_a_crew_ends_when_one_fails() -> None:
    begun: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise PeerLost("gone")
        await asyncio.sleep(60 if number == 1 else 0)

    with pytest.raises(PeerLost):
        await each(range(100), work, at_once=2)
    assert len(begun) < 10
