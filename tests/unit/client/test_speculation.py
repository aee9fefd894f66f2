"""Speculation: guesses change how fast an answer comes, and nothing else."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from memory_swarm import MemorySwarm, StageShelf, answer, until
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.pieces import Piece, Stats
from bsns.client.sampling import SamplingOptions
from bsns.client.speculation import MOST, PRIORS, Cost, Lookup, follow
from bsns.core.ids import PeerId
from bsns.protocol.codecs import RAW
from bsns.protocol.inference import MAX_UNDER_WAY, Part
from bsns.worker.replays import MAX_REWINDS
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
GREEDY = SamplingOptions(max_tokens=60)
SEEDED = SamplingOptions(max_tokens=60, temperature=1.0, top_p=0.9, seed=7)
PROMPT = prompt(9)


class Oracle:
    """Knows the answer, and is wrong at random: in `wrong` of its guesses."""

    quick = True

    def __init__(self, line: Sequence[int], wrong: float = 0.0, most: int = 6, *, further: bool = False) -> None:
        """`further`: whether it goes on while guesses are being checked."""
        self.line, self.wrong, self.most, self.further = line, wrong, most, further
        self.went_on = 0
        self.rng = random.Random(5)
        self.heard: list[tuple[int, int]] = []

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        assert list(tokens) == list(self.line[: len(tokens)])
        count = self.rng.randint(0, min(most, self.most)) if self.wrong else min(most, self.most)
        known = self.line[len(tokens) : len(tokens) + count]
        return [token if self.rng.random() >= self.wrong else (token + 1) % 50 for token in known]

    def go_on(self, tokens: Sequence[int], ahead: Sequence[int], most: int) -> list[int]:
        assert list(tokens) == list(self.line[: len(tokens)])
        if not self.further:
            return []
        said = self.guess([*tokens, *self.line[len(tokens) : len(tokens) + len(ahead)]], most)
        self.went_on += bool(said)
        return said

    def checked(self, guesses: int, right: int) -> None:
        self.heard.append((guesses, right))

    def took(self, rows: int, step_s: float, computing_s: Sequence[float]) -> None:
        assert rows >= 1
        assert step_s > 0
        assert all(each_s >= 0 for each_s in computing_s)

    def took_further(self, rows: int, behind_s: float) -> None:
        assert rows >= 1
        assert behind_s >= 0


class Scene:
    """Three stages, `a0` to `a2`, and for each a spare, `b0` to `b2`."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm, self.stages, self.ends = swarm, shelf.stages(path, CUTS), shelf.ends(path)

    async def start(self, kinds: str = "a") -> None:
        for kind in kinds:
            for number, stage in enumerate(self.stages):
                await self.swarm.add_node(
                    f"{kind}{number}",
                    TorchExecutor(stage, dtype="float32"),
                    block_count=CUTS[-1],
                    context_tokens=512,
                    block_time_s=1e-3 if kind == "a" else 1.0,
                )

    def computes_at_once(self) -> None:
        """Nothing goes to a thread, however slow the machine just was: what is under way together is certain then."""
        for node in self.swarm.nodes.values():
            node.worker._short_s = math.inf
        for client, _ in self.swarm.clients:
            client._decoder._short_s = math.inf

    async def undisturbed(self, options: SamplingOptions) -> list[int]:
        return await answer(self.client(), PROMPT, options)

    def client(self, oracle: Oracle | None = None, *, warm_spares: bool = False, **options: object) -> Generator:
        guesser = (lambda: oracle) if oracle is not None else None
        return self.swarm.client(
            self.ends,
            context_tokens=512,
            guesser=guesser,
            warm_spares=warm_spares,
            **options,  # type: ignore[arg-type]
        )


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
async def test_the_same_tokens_in_fewer_steps(scene: Scene, options: SamplingOptions, wrong: float) -> None:
    await scene.start()
    expected = await scene.undisturbed(options)
    oracle, stats = Oracle([*PROMPT, *expected], wrong), Stats()
    tokens = [piece.token async for piece in scene.client(oracle).stream(PROMPT, options, stats)]
    assert tokens == expected
    assert stats.tokens == len(expected)
    if wrong == 0.0:
        # the prompt's step brings one token, each further one seven, and the last what is left
        assert len(stats.turns_ms) == 1 + -(-(len(expected) - 1) // 7)
        assert set(oracle.heard) == {(6, 6), (2, 2)}
    if wrong == 1.0:
        assert len(stats.turns_ms) == len(expected)
        assert all(right == 0 for _, right in oracle.heard)
    session_rows = {node.worker.rows for node in scene.swarm.nodes.values()}
    assert len(session_rows) == 1, "every stage computes what the first does"


async def test_an_end_among_the_guesses_ends_it(scene: Scene) -> None:
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    end = expected[20]
    upto = expected.index(end) + 1
    client = scene.client(Oracle([*PROMPT, *expected]), end_tokens={end})
    pieces = [piece async for piece in client.stream(PROMPT, GREEDY)]
    assert [piece.token for piece in pieces] == expected[:upto]
    assert pieces[-1].finished == "stop"


async def test_guesses_keep_to_the_room_there_is(scene: Scene) -> None:
    """A session holds the prompt and the answer, and not a guess more; nor does the model's context."""
    await scene.start()
    long = SamplingOptions(max_tokens=10_000)
    expected = [piece.token async for piece in scene.client().stream(prompt(480), long) if piece.token is not None]
    assert len(expected) == 512 - 480
    oracle = Oracle([*prompt(480), *expected, *range(50)], most=40)
    assert await answer(scene.client(oracle), prompt(480), long) == expected


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.5])
async def test_the_next_steps_go_on_before_the_last_is_back(
    scene: Scene, options: SamplingOptions, wrong: float
) -> None:
    await scene.start()
    expected = await scene.undisturbed(options)
    oracle, stats = Oracle([*PROMPT, *expected], wrong, most=4, further=True), Stats()
    client = scene.client(oracle)
    scene.computes_at_once()
    under_way: list[int] = []
    tokens: list[int | None] = []
    async for piece in client.stream(PROMPT, options, stats):
        tokens.append(piece.token)
        under_way += [len(reader.awaited) for reader in client._readers.values()]
    assert tokens == expected
    assert oracle.went_on > 3
    assert max(under_way) == (MAX_UNDER_WAY if wrong < 0.5 else 3)
    assert client.tally.right == sum(right for _, right in oracle.heard)
    if wrong == 0.0:
        # the prompt's step brings one token, the next one more than its guesses, and each further one its own
        assert len(stats.turns_ms) == 2 + -(-(len(expected) - 6) // 4)
        assert client.tally.guesses == client.tally.right == len(expected) - 2
    await until(lambda: not any(len(node.worker.sessions) for node in scene.swarm.nodes.values()))


async def test_an_answer_that_ends_amid_steps_is_kept_when_they_have_passed(scene: Scene) -> None:
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    upto = next(at + 1 for at, token in enumerate(expected) if at > 30 and token not in expected[:at])
    end = expected[upto - 1]
    oracle = Oracle([*PROMPT, *expected], most=3, further=True)
    client = scene.client(oracle, end_tokens={end}, keep_sessions=4)
    scene.computes_at_once()
    assert await answer(client, PROMPT, GREEDY) == expected[:upto]
    assert client._parking._trailing, "its last guesses are on their way"
    await until(lambda: len(client._parking._kept) == 1)
    assert not client._parking._trailing
    longer = [*PROMPT, *expected[:upto], *prompt(5)]
    stats = Stats()
    again = [piece.token async for piece in client.stream(longer, GREEDY, stats, guess=False)]
    assert stats.cached_tokens == len(PROMPT) + upto - 1
    fresh = scene.client(end_tokens={end})
    assert again == await answer(fresh, longer, GREEDY)


async def test_an_answer_that_ends_amid_steps_that_are_lost_is_not_kept(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsns.client.parking.RESUME_S", 0.05)
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    client = scene.client(Oracle([*PROMPT, *expected]), keep_sessions=4)
    stream = client.stream(PROMPT, GREEDY)
    await anext(stream)
    (reader,) = client._readers.values()
    async for _ in stream:
        reader.trailing = 10**6
    await until(lambda: not any(len(node.worker.sessions) for node in scene.swarm.nodes.values()))
    assert (len(client._parking._kept), client._parking._trailing) == (0, {})


async def test_guesses_that_passed_before_the_answer_was_read_are_not_waited_for(scene: Scene) -> None:
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    upto = next(at + 1 for at, token in enumerate(expected) if at > 30 and token not in expected[:at])
    oracle = Oracle([*PROMPT, *expected], most=3, further=True)
    client = scene.client(oracle, end_tokens={expected[upto - 1]}, keep_sessions=4)
    async for _ in client.stream(PROMPT, GREEDY):
        await asyncio.sleep(0.01)
    assert not client._parking._trailing
    await until(lambda: len(client._parking._kept) == 1, 0.5)


async def test_an_answer_given_up_amid_a_turn_leaves_the_next_on_its_session_alone(scene: Scene) -> None:
    """Its turn ends on the decoder's thread when the kept session is another answer's already."""
    await scene.start()
    long = prompt(60)
    expected = await answer(scene.client(), long, GREEDY)
    oracle = Oracle([*long, *expected], most=3)
    oracle.quick = False  # like a draft model's: turns are taken on the thread
    may_go_on, held = threading.Event(), threading.Event()
    guess = oracle.guess

    def slowly(tokens: Sequence[int], most: int) -> list[int]:
        held.set()
        may_go_on.wait(5.0)
        return guess(tokens, most)

    client = scene.client(oracle, keep_sessions=4, deadline_s=3.0)
    stream = client.stream(long, GREEDY)
    await anext(stream)
    oracle.guess = slowly  # type: ignore[method-assign]

    async def read_on() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read_on())
    await until(held.is_set)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await until(lambda: len(client._parking._kept) == 1)
    second = asyncio.create_task(_tokens(client.stream(long, GREEDY, guess=False)))
    await until(lambda: bool(client._readers))
    may_go_on.set()
    assert await second == expected


async def _tokens(stream: AsyncIterator[Piece]) -> list[int | None]:
    return [piece.token async for piece in stream]


async def test_a_first_stage_lost_after_the_last_token_costs_nothing(scene: Scene) -> None:
    await scene.start("ab")
    expected = await scene.undisturbed(GREEDY)
    client = scene.client(Oracle([*PROMPT, *expected], most=3), keep_sessions=4)
    stream = client.stream(PROMPT, GREEDY)
    tokens = [(await anext(stream)).token]
    (reader,) = client._readers.values()
    done = reader.answer
    assert done is not None
    await until(lambda: done.finished is not None and reader.goal == reader.through)  # and is not read yet
    scene.swarm.network.kill(PeerId("a0"))
    await until(lambda: client.repairs == 1)
    await until(lambda: reader.sent == reader.through)
    tokens += await _tokens(stream)
    assert tokens == expected
    await until(lambda: len(client._parking._kept) == 1)
    stats, longer = Stats(), [*PROMPT, *expected, *prompt(5)]
    again = [piece.token async for piece in client.stream(longer, GREEDY, stats, guess=False)]
    assert stats.cached_tokens == len(PROMPT) + len(expected) - 1
    assert again == await answer(scene.client(), longer, GREEDY)


@pytest.mark.parametrize("further", [False, True], ids=["alone", "further"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
@pytest.mark.parametrize("after", [4, 11, 23])
async def test_a_stage_lost_among_guesses(scene: Scene, lost: str, after: int, warm: bool, further: bool) -> None:
    await scene.start("ab")
    expected = await scene.undisturbed(SEEDED)
    client = scene.client(Oracle([*PROMPT, *expected], wrong=0.3, further=further), warm_spares=warm)
    stream = client.stream(PROMPT, SEEDED)
    tokens = [(await anext(stream)).token for _ in range(after)]
    scene.swarm.network.kill(PeerId(lost))
    tokens += [piece.token async for piece in stream]
    assert tokens == expected
    assert client.repairs >= 1
    alive = [node.worker for name, node in scene.swarm.nodes.items() if name != lost]
    await until(lambda: not any(len(worker.sessions) for worker in alive))


async def test_spares_follow_more_wrong_guesses_than_a_ring_would_make(scene: Scene) -> None:
    """What is written again and again, each time further on, is no ring of stages that keeps itself busy."""
    await scene.start("ab")
    options = SamplingOptions(max_tokens=3 * MAX_REWINDS)
    expected = await scene.undisturbed(options)
    client = scene.client(Oracle([*PROMPT, *expected], wrong=1.0, most=3), warm_spares=True)
    stream = client.stream(PROMPT, options)
    tokens = [(await anext(stream)).token for _ in range(2 * MAX_REWINDS + 30)]
    (held,) = client._spares._held.values()
    assert {str(peer) for peer in held.spares} == {"b0", "b1", "b2"}
    assert not held.unfit
    scene.swarm.network.kill(PeerId("a1"))
    tokens += [piece.token async for piece in stream]
    assert tokens == expected
    assert client.warm_repairs == 1


def told(lookup: Lookup, *, row_s: float = 0.001, steps: int = 3) -> Lookup:
    """One that knows what a step takes: 0.1 s, and so much more for each further row."""
    for _ in range(steps):
        lookup.took(1, 0.1, [0.05])
    lookup.took(11, 0.1 + 10 * row_s, [0.05])
    lookup.checked(10, 5)
    return lookup


@pytest.mark.parametrize(
    ("tokens", "guessed"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1, 2]),
        ([7, 7, 7, 7, 7], [7, 7, 7, 7, 7]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2, 8, 1]),  # the last time counts
        ([1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3], [9, 4, 2, 3, 8]),  # and more than two in a row count more
        ([1, 2, 3, 4, 5], []),
        ([1, 2, 3, 1], []),
        ([1], []),
    ],
)
def test_what_followed_before_is_guessed(tokens: list[int], guessed: list[int]) -> None:
    assert told(Lookup(), row_s=1e-6).guess(tokens, 5) == guessed


def test_it_reads_on_as_the_answer_grows() -> None:
    lookup, rng = told(Lookup()), random.Random(1)
    tokens = [rng.randrange(8) for _ in range(40)]
    for _ in range(200):
        tokens.append(rng.randrange(8))
        fresh = told(Lookup())
        assert bool(lookup.guess(tokens, 4)) == bool(fresh.guess(tokens, 4))


def test_nothing_is_guessed_before_a_step_was_seen() -> None:
    assert Lookup().guess([1, 2, 3, 1, 2, 3], 5) == []


def test_wrong_guesses_become_rare_and_right_ones_many() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    lookup = told(Lookup(), row_s=0.01)
    counts = []
    for _ in range(60):
        guesses = lookup.guess(tokens, MOST)
        counts.append(len(guesses))
        lookup.took(1 + len(guesses), 0.1 + 0.01 * len(guesses), [0.05])
        lookup.checked(len(guesses), 0)
    assert 0 < sum(count > 0 for count in counts[10:]) < 10, "it tries again, and seldom"
    for _ in range(20):
        lookup._matched = 4
        lookup.checked(8, 8)
    assert len(lookup.guess(tokens, MOST)) > 20


def test_what_goes_on_goes_on_with_what_was_copied() -> None:
    lookup = told(Lookup(), row_s=1e-6)
    for _ in range(9):
        lookup._matched = 3
        lookup.checked(8, 8)
    lookup._matched = 0
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert lookup.go_on(tokens, [], 4) == []
    first = lookup.guess(tokens, 4)
    assert first == [4, 5, 6, 1]
    assert lookup.go_on(tokens, first, 3) == [2, 3, 4]
    lookup.checked(5, 5)
    assert lookup.go_on([*tokens, *first, 2], [3, 4], 5) == [5, 6, 1, 2, 3]
    assert lookup.go_on(tokens, first, 0) == []


def test_a_further_step_has_to_be_worth_its_while() -> None:
    cost = Cost()
    assert cost.best_further(0.99, 8, 64) == 0, "nothing is known yet"
    cost.took(1, 0.4, [0.002] * 5)
    assert cost.best_further(0.99, 30, 64) > 30
    assert cost.best_further(0.5, 8, 64) == 0, "it would be in vain"
    assert cost.best_further(0.99, 30, 0) == 0
    near = Cost()
    near.took(1, 0.01, [0.002] * 5)
    assert near.best_further(0.95, 10, 64) > 5, "the stages work on both at once"
    for _ in range(3):
        near.took_further(11, 0.02)
    assert near.best_further(0.95, 10, 64) == 0, "as they do not on one machine"


def test_dear_rows_are_not_guessed_for() -> None:
    cost = Cost()
    cost.took(1, 0.1, [0.1])
    cost.took(5, 0.5, [0.5])
    assert cost.best_guesses(0.9, 8) == 0
    cheap = Cost()
    cheap.took(1, 0.1, [0.01])
    assert cheap.best_guesses(0.9, 64) > 8
    assert [cheap.best_guesses(0.0, 8), cheap.best_guesses(0.9, 0)] == [0, 0]


def test_what_repeats_goes_on() -> None:
    assert follow([1, 2, 3, 4], 1, 3, range(5)) == [2, 3, 2, 3, 2]
    assert sorted(PRIORS) == [2, 3, 4]


async def test_what_a_replay_brings_of_wrong_guesses_is_not_taken(scene: Scene) -> None:
    """A row at the very place that is awaited, as long as what is awaited, but of an earlier turn."""
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    client = scene.client()
    stream = client.stream(PROMPT, GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    (reader,) = client._readers.values()
    late = Part(reader.session.id, reader.through, 1, 1, turn=reader.turns - 1)
    wrong = memoryview(bytes(range(1, 5)) * scene.ends.hidden_size)
    due = reader.due
    assert due is not None
    assert late.position + 1 == reader.goal
    client._intake.take(PeerId("a2"), RAW, [(late, wrong)])
    assert reader.due == due
    tokens += [piece.token async for piece in stream]
    assert (tokens, client.repairs) == (expected, 0)


@pytest.mark.parametrize("frozen", ["a0", "a1", "a2"])
async def test_a_stage_that_freezes_while_several_steps_are_under_way(scene: Scene, frozen: str) -> None:
    await scene.start("ab")
    expected = await scene.undisturbed(SEEDED)
    client = scene.client(Oracle([*PROMPT, *expected], wrong=0.1, most=3, further=True))
    stream = client.stream(PROMPT, SEEDED)
    tokens = [(await anext(stream)).token for _ in range(3)]
    (reader,) = client._readers.values()
    await until(lambda: len(reader.awaited) > 1)
    scene.swarm.network.freeze(PeerId(frozen))
    tokens += await _tokens(stream)
    assert tokens == expected
    assert client.repairs >= 1


async def test_a_last_stage_that_answers_a_later_step_first_is_not_believed(scene: Scene) -> None:
    """Nor one that says a step has passed which nobody awaits."""
    await scene.start()
    expected = await scene.undisturbed(GREEDY)
    client = scene.client(Oracle([*PROMPT, *expected], most=3, further=True))
    stream = client.stream(PROMPT, GREEDY)
    tokens = [(await anext(stream)).token for _ in range(3)]
    (reader,) = client._readers.values()
    await until(lambda: len(reader.awaited) > len(reader.came) + 1)
    due, later = reader.due, reader.awaited[-1]
    for step, turn in ((later, later.turn), (later, 10**9)):
        part = Part(reader.session.id, step.start, step.rows, step.rows, turn=turn)
        lie = memoryview(bytes(4 * scene.ends.hidden_size * step.rows))
        client._intake.take(PeerId("a2"), RAW, [(part, lie)])
    assert reader.due == due
    tokens += await _tokens(stream)
    assert (tokens, client.repairs) == (expected, 0)
