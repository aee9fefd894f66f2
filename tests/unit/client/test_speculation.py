"""Speculation: guesses change how fast an answer comes, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from memory_swarm import MemorySwarm, StageShelf, answer, until
from tiny_models import prompt

from bsns.client.generate import Generator, Stats
from bsns.client.sampling import SamplingOptions
from bsns.client.speculation import MOST, PRIORS, Cost, Lookup, follow
from bsns.core.ids import PeerId
from bsns.protocol.codecs import RAW
from bsns.protocol.inference import Part
from bsns.worker.replays import MAX_REWINDS
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
GREEDY = SamplingOptions(max_tokens=60)
SEEDED = SamplingOptions(max_tokens=60, temperature=1.0, top_p=0.9, seed=7)
PROMPT = prompt(9)


class Oracle:
    """Knows the answer, and is wrong at random: in `wrong` of its guesses."""

    quick = True

    def __init__(self, line: Sequence[int], wrong: float = 0.0, most: int = 6) -> None:
        self.line, self.wrong, self.most = line, wrong, most
        self.rng = random.Random(5)
        self.heard: list[tuple[int, int]] = []

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        assert list(tokens) == list(self.line[: len(tokens)])
        count = self.rng.randint(0, min(most, self.most)) if self.wrong else min(most, self.most)
        known = self.line[len(tokens) : len(tokens) + count]
        return [token if self.rng.random() >= self.wrong else (token + 1) % 50 for token in known]

    def took(self, rows: int, right: int, step_s: float, computing_s: float) -> None:
        self.heard.append((rows, right))
        assert step_s > 0
        assert computing_s >= 0


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
        assert set(oracle.heard) == {(7, 6)}
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


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
@pytest.mark.parametrize("after", [4, 11, 23])
async def test_a_stage_lost_among_guesses(scene: Scene, lost: str, after: int, warm: bool) -> None:
    await scene.start("ab")
    expected = await scene.undisturbed(SEEDED)
    client = scene.client(Oracle([*PROMPT, *expected], wrong=0.3), warm_spares=warm)
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
        lookup.took(1, 0, 0.1, 0.05)
    lookup.took(11, 5, 0.1 + 10 * row_s, 0.05)
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
        lookup.took(1 + len(guesses), 0, 0.1 + 0.01 * len(guesses), 0.05)
    assert 0 < sum(count > 0 for count in counts[10:]) < 10, "it tries again, and seldom"
    for _ in range(20):
        lookup._matched = 4
        lookup.took(9, 8, 0.18, 0.05)
    assert len(lookup.guess(tokens, MOST)) > 20


def test_dear_rows_are_not_guessed_for() -> None:
    cost = Cost()
    cost.took(1, 0.1, 0.1)
    cost.took(5, 0.5, 0.5)
    assert cost.best_guesses(0.9, 8) == 0
    cheap = Cost()
    cheap.took(1, 0.1, 0.01)
    assert cheap.best_guesses(0.9, 64) > 8
    assert [cheap.best_guesses(0.0, 8), cheap.best_guesses(0.9, 0)] == [0, 0]


def test_what_repeats_goes_on() -> None:
    assert follow([1, 2, 3], 1, 5) == [2, 3, 2, 3, 2]
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
    assert (reader.due, late.position + 1) == (True, reader.goal)
    client._on_results(PeerId("a2"), RAW, [(late, wrong)])
    assert reader.due
    tokens += [piece.token async for piece in stream]
    assert (tokens, client.repairs) == (expected, 0)
