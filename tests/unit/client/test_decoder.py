"""The client's compute thread: what arrives together is turned together, and trouble stays with its answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from memory_swarm import StageShelf

from bsns.client.decoder import Answer, Arrived, Decoder, Turned
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import PeerFailed
from bsns.core.ids import SessionId
from bsns.model.ends import Ends
from bsns.model.tensors import to_memory, to_tensor
from bsns.protocol.inference import Passed

HIDDEN = 32
DEADLINE_S = 5.0


class Desk:
    """A decoder, and what it told."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.turns: asyncio.Queue[list[Turned]] = asyncio.Queue()
        self.failures: asyncio.Queue[tuple[list[Answer], Exception]] = asyncio.Queue()
        self.decoder = Decoder(
            ends,
            dtype="float32",
            threads=1,
            on_turned=self.turns.put_nowait,
            on_failed=lambda *told: self.failures.put_nowait(told),
        )

    async def turn(self) -> list[Turned]:
        async with asyncio.timeout(DEADLINE_S):
            return await self.turns.get()


@pytest.fixture
async def desk(shelf: StageShelf, tiny_model: Callable[[str], Path]) -> AsyncIterator[Desk]:
    desk = Desk(shelf.ends(tiny_model("gpt2")))
    yield desk
    await desk.decoder.close()


def answer(prompt: int = 3, max_tokens: int = 10, end_tokens: frozenset[int] = frozenset()) -> Answer:
    return Answer(SessionId(1), SamplingOptions(), end_tokens, list(range(prompt)), prompt, max_tokens)


def row(seed: int) -> memoryview:
    return to_memory(torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed)))


def best(desk: Desk, hidden: memoryview) -> int:
    return int(desk.ends.logits(to_tensor(hidden, "float32", (1, HIDDEN)))[0].argmax())


async def test_embeds_and_reads_logits(desk: Desk) -> None:
    hidden = await desk.decoder.embed([5, 6, 7], 2)
    expected = desk.ends.embed(torch.tensor([5, 6, 7]), torch.tensor([2, 3, 4]))
    assert torch.equal(to_tensor(hidden, "float32", (3, HIDDEN)), expected)
    assert torch.equal(await desk.decoder.logits(hidden, 3), desk.ends.logits(expected))
    with pytest.raises(RuntimeError):
        await desk.decoder.logits(hidden, 5)
    with pytest.raises(IndexError):
        await desk.decoder.embed([10**6], 0)
    assert len(await desk.decoder.embed([1], 0)) == 4 * HIDDEN  # the thread lives on


async def test_a_turn_serves_all_that_arrived(desk: Desk) -> None:
    answers = [answer(prompt) for prompt in (2, 5, 9)]
    rows = [row(seed) for seed in range(3)]
    hops = (Passed(1.0, 0.5, 3),)
    desk.decoder.submit([Arrived(a, hidden, hops) for a, hidden in zip(answers, rows, strict=True)])
    turned = await desk.turn()
    assert [item.answer for item in turned] == answers
    for item, hidden, length in zip(turned, rows, (2, 5, 9), strict=True):
        assert item.tokens == [best(desk, hidden)] == item.answer.tokens[-1:]
        assert (item.finished, len(item.answer.tokens)) == (None, length + 1)
        assert item.hidden is not None
        expected = desk.ends.embed(torch.tensor(item.tokens), torch.tensor([length]))
        assert torch.equal(to_tensor(item.hidden, "float32", (1, HIDDEN)), expected)
        ((total_ms, said_hops),) = item.answer.turns_ms
        assert total_ms >= 0
        assert said_hops == hops
        assert [(line.tokens, line.sent_s > 0) for line in item.answer.under_way] == [(item.tokens, True)]


async def test_the_last_token_is_not_embedded(desk: Desk) -> None:
    hidden = row(1)
    ended = answer(end_tokens=frozenset({best(desk, hidden)}))
    full, running = answer(max_tokens=1), answer()
    desk.decoder.submit([Arrived(a, hidden) for a in (ended, running, full)])
    turned = await desk.turn()
    assert [item.finished for item in turned] == ["stop", None, "length"]
    assert [item.hidden is None for item in turned] == [True, False, True]
    assert [a.finished for a in (ended, running, full)] == ["stop", None, "length"]


async def test_numbers_that_are_none_fail_their_answer_alone(desk: Desk) -> None:
    nothing = memoryview(b"\xff" * 4 * HIDDEN)
    answers = [answer(), answer(), answer()]
    good = row(1)
    desk.decoder.submit([Arrived(a, h) for a, h in zip(answers, (good, nothing, good), strict=True)])
    turned = await desk.turn()
    assert [item.answer for item in turned] == [answers[0], answers[2]]
    assert [item.tokens for item in turned] == [[best(desk, good)]] * 2
    async with asyncio.timeout(DEADLINE_S):
        failed, error = await desk.failures.get()
    assert isinstance(error, PeerFailed)
    assert failed == [answers[1]]
    assert failed[0] is answers[1]


async def test_close_ends_the_thread(desk: Desk) -> None:
    await desk.decoder.embed([1, 2], 0)
    assert any(thread.name.startswith("decoder") for thread in threading.enumerate())
    await desk.decoder.close()
    assert not any(thread.name.startswith("decoder") for thread in threading.enumerate())


async def test_nothing_is_turned_once_it_is_closed(desk: Desk) -> None:
    """Not even what came while its last turn was under way."""
    may_go_on, begun = threading.Event(), threading.Event()
    draw = Answer.draw

    class Slow(Answer):
        def draw(self, *given: object) -> list[int]:
            begun.set()
            assert may_go_on.wait(DEADLINE_S)
            return draw(self, *given)  # type: ignore[arg-type]

    slow = Slow(SessionId(1), SamplingOptions(), frozenset(), [0, 1, 2], 3, 10)
    desk.decoder._turn_s = 1.0  # on its thread
    desk.decoder.submit([Arrived(slow, row(1), [])])
    await asyncio.to_thread(begun.wait, DEADLINE_S)
    desk.decoder.submit([Arrived(answer(), row(2), [])])
    closing = asyncio.create_task(desk.decoder.close())
    await asyncio.sleep(0)
    may_go_on.set()
    await closing
    assert [turned.answer for turned in await desk.turn()] == [slow]
    for _ in range(3):
        await asyncio.sleep(0)
    assert desk.turns.empty()
    assert desk.failures.empty()
