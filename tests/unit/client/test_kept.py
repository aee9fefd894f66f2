"""Kept sessions: a prompt that goes on where an answer ended is not computed again, and gets the same answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_swarm import MemorySwarm, StageShelf, answer, until
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.kept import Kept, KeptSessions, common_prefix
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.client.speculation import Lookup
from bsns.core.ids import PeerId
from bsns.worker.batching import Batch
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
FIRST = prompt(90)
GREEDY = SamplingOptions(max_tokens=20)


class Scene:
    """Three stages, `a0` to `a2`, and for each a spare, `b0` to `b2`."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm, self.stages, self.ends = swarm, shelf.stages(path, CUTS), shelf.ends(path)

    async def start(self, kinds: str = "a", cache_tokens: int = 4096) -> None:
        for kind in kinds:
            for number, stage in enumerate(self.stages):
                await self.swarm.add_node(
                    f"{kind}{number}",
                    TorchExecutor(stage, dtype="float32"),
                    block_count=CUTS[-1],
                    context_tokens=512,
                    cache_tokens=cache_tokens,
                    block_time_s=1e-3 if kind == "a" else 1.0,
                )

    def client(self, keep_sessions: int = 4, **options: object) -> Generator:
        return self.swarm.client(self.ends, context_tokens=512, keep_sessions=keep_sessions, **options)  # type: ignore[arg-type]

    def rows(self) -> int:
        return sum(node.worker.rows for node in self.swarm.nodes.values())

    async def parked(self, sessions: int) -> None:
        """So many on every stage, and none that runs."""
        tables = [node.worker.sessions for node in self.swarm.nodes.values()]
        await until(lambda: all(len(t) == 0 and len(t.all()) == sessions for t in tables[:3]))
        for table in tables:
            table.check()


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


async def said(client: Generator, tokens: list[int], tenant: str = "") -> tuple[list[int], Stats]:
    stats = Stats()
    stream = client.stream(tokens, GREEDY, stats, tenant=tenant)
    return [piece.token async for piece in stream if piece.token is not None], stats


@pytest.mark.parametrize("guesser", [None, Lookup])
async def test_a_talk_computes_what_is_new_alone(scene: Scene, guesser: Callable[[], Lookup] | None) -> None:
    await scene.start()
    client, other, talk = scene.client(guesser=guesser), scene.client(0), list(FIRST)
    for turn in range(4):
        expected = await answer(other, talk, GREEDY)
        before = scene.rows()
        tokens, stats = await said(client, talk)
        assert tokens == expected
        if turn:
            # of the answer before all but the last token, which was drawn and not computed
            assert stats.cached_tokens == stats.prompt_tokens - 8 - 1
            if guesser is None:
                assert scene.rows() - before == 3 * (9 + 19)
        await scene.parked(1)
        talk += [*tokens, *prompt(8)]
    await client.close()
    await until(lambda: not any(node.worker.sessions.all() for node in scene.swarm.nodes.values()))


async def test_a_prompt_that_parts_earlier_keeps_what_is_common(scene: Scene) -> None:
    """As when a question is put in other words, or an answer drawn again."""
    await scene.start()
    client = scene.client()
    first, _ = await said(client, FIRST)
    await scene.parked(1)
    again, stats = await said(client, FIRST)
    assert (again, stats.cached_tokens) == (first, len(FIRST) - 1)
    await scene.parked(1)
    other = [*FIRST[:70], *prompt(30)[::-1]]
    tokens, stats = await said(client, other)
    assert stats.cached_tokens == common_prefix(other, FIRST)
    assert tokens == await answer(scene.client(0), other, GREEDY)


@pytest.mark.parametrize("slow_batch", [1, 2, 20])
async def test_an_answer_of_which_a_step_was_late_is_kept(
    scene: Scene, slow_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So late that its client looked whether all stages are there."""
    await scene.start()
    client, worker = scene.client(), scene.swarm.nodes["a1"].worker
    await said(client, prompt(40)[::-1])
    await scene.parked(1)
    (executor,) = worker._executors.values()
    run, numbers = executor.run, itertools.count(1)

    def slowly(batch: Batch) -> list[memoryview]:
        if next(numbers) == slow_batch:
            time.sleep(0.7)  # a compute thread that is slow, not a test that waits
        return run(batch)

    monkeypatch.setattr(executor, "run", slowly)
    monkeypatch.setattr(worker, "_short_s", 0.0)  # on its thread: the client is not held up
    await said(client, FIRST)
    assert next(numbers) > slow_batch
    await scene.parked(2)
    _, stats = await said(client, FIRST)
    assert stats.cached_tokens == len(FIRST) - 1


async def test_tenants_share_nothing(scene: Scene) -> None:
    await scene.start()
    client = scene.client()
    await said(client, FIRST, "one")
    await scene.parked(1)
    _, stats = await said(client, FIRST, "two")
    assert stats.cached_tokens == 0
    await scene.parked(2)
    _, stats = await said(client, FIRST, "one")
    assert stats.cached_tokens == len(FIRST) - 1


async def test_another_clients_sessions_make_way(scene: Scene) -> None:
    await scene.start(cache_tokens=130)
    client = scene.client()
    expected, _ = await said(client, FIRST)
    await scene.parked(1)
    await answer(scene.client(0), prompt(100)[::-1], GREEDY)
    await scene.parked(0)
    tokens, stats = await said(client, FIRST)
    assert (tokens, stats.cached_tokens) == (expected, 0)


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_a_stage_lost_while_nobody_asks(scene: Scene, lost: str) -> None:
    await scene.start("ab")
    client = scene.client()
    expected, _ = await said(client, FIRST)
    await scene.parked(1)
    scene.swarm.network.kill(PeerId(lost))
    await until(lambda: not len(client._parking._kept))
    tokens, stats = await said(client, FIRST)
    assert (tokens, stats.cached_tokens) == (expected, 0)
    alive = [node.worker.sessions for name, node in scene.swarm.nodes.items() if name != lost]
    await until(lambda: sum(len(table.all()) for table in alive) == 3, 5.0)


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_a_stage_lost_in_the_next_answer(scene: Scene, lost: str) -> None:
    """Whoever takes its place gets all of the talk, from the stage before or from the client."""
    await scene.start("ab")
    client = scene.client()
    first, _ = await said(client, FIRST)
    await scene.parked(1)
    talk = [*FIRST, *first, *prompt(8)]
    expected = await answer(scene.client(0), talk, GREEDY)
    stats = Stats()
    stream = client.stream(talk, GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(5)]
    scene.swarm.network.kill(PeerId(lost))
    tokens += [piece.token async for piece in stream]
    assert tokens == expected
    assert stats.cached_tokens > 100
    assert client.repairs == 1


async def test_an_answer_that_is_cut_short_is_not_kept_under_way(scene: Scene) -> None:
    """A step of it may still be on its way, and would come to the next."""
    await scene.start()
    client = scene.client()
    stream = client.stream(FIRST, SamplingOptions(max_tokens=300))
    for _ in range(5):
        await anext(stream)
    await stream.aclose()
    await until(lambda: all(len(node.worker.sessions) == 0 for node in scene.swarm.nodes.values()))
    expected = await answer(scene.client(0), FIRST, GREEDY)
    tokens, _ = await said(client, FIRST)
    assert tokens == expected


async def test_no_more_than_so_many_are_kept(scene: Scene) -> None:
    await scene.start()
    client = scene.client(2)
    for start in range(4):
        await said(client, prompt(90)[start:])
    await scene.parked(2)
    assert len(client._parking._kept) == 2


def test_which_session_serves_a_prompt() -> None:
    class Nothing:
        route = ()

    def kept(*tokens: int, tenant: str = "") -> Kept:
        return Kept(Nothing(), tokens, tenant)  # type: ignore[arg-type]

    sessions = KeptSessions(3)
    short, long, other = kept(*range(40)), kept(*range(60)), kept(*range(90), tenant="x")
    for each in (short, long, other):
        assert sessions.add(each) == []
    assert sessions.take(range(30), "") is None, "too little to be worth asking for"
    assert sessions.take([*range(35), *range(900, 990)], "y") is None
    assert sessions.take(range(100), "") == (long, 60)
    assert sessions.take(range(40), "") == (short, 39), "the last token's output is wanted"
    assert sessions.take([*range(40), *range(900, 990)], "x") is None, "most of it would be lost"
    assert sessions.take([*range(50), *range(900, 990)], "x") == (other, 50)
    assert len(sessions) == 0
