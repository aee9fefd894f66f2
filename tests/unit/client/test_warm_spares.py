"""Warm spares: a lost stage is replaced by a node that has computed along, and nothing is computed again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from memory_swarm import MemorySwarm, StageShelf, answer, until
from running_time import running_s
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.links import Link
from bsns.client.pieces import Piece, Stats
from bsns.client.reader import Reader
from bsns.client.sampling import SamplingOptions
from bsns.client.spares import Spare, Spares, _Held
from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.routing.chain import Hop
from bsns.worker.batching import Batch
from bsns.worker.faults import FaultyWorker
from bsns.worker.service import Worker
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
GREEDY = SamplingOptions(max_tokens=60)
SEEDED = SamplingOptions(max_tokens=60, temperature=1.0, top_p=0.9, seed=7)
LONG = prompt(240)
FEW = 3
"""Rows that a spare may compute beside those that come anyway: the newest once more, and what was under way."""


class Snail(TorchExecutor):
    """An executor that can be told to be slow."""

    delay_s = 0.0

    def run(self, batch: Batch) -> list[memoryview]:
        time.sleep(self.delay_s)  # a compute thread that is slow, not a test that waits
        return super().run(batch)


class Scene:
    """Three stages, `a0` to `a2`, which clients prefer, and spares for them, `b0` to `b2`."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm = swarm
        self.stages = shelf.stages(path, CUTS)
        self.wide = shelf.stage(path, BlockRange(0, 3))
        self.ends = shelf.ends(path)
        self.killed: set[str] = set()

    async def start(self, *spares: str) -> None:
        for name in ("a0", "a1", "a2", *spares):
            await self.add(name)

    async def add(self, name: str, *, kind: type[Worker] = FaultyWorker, cache_tokens: int = 4096) -> None:
        block_time_s = 1e-3 if name[0] == "a" else 1.0 if name[0] == "b" else 2.0  # far beyond what pings may differ
        await self.swarm.add_node(
            name,
            Snail(self.stages[int(name[1])], dtype="float32"),
            block_count=CUTS[-1],
            context_tokens=512,
            cache_tokens=cache_tokens,
            block_time_s=block_time_s,
            kind=kind,
        )

    def client(self, *, warm: bool = True) -> Generator:
        return self.swarm.client(self.ends, context_tokens=512, warm_spares=warm)

    def worker(self, name: str) -> Worker:
        return self.swarm.nodes[name].worker

    def snail(self, name: str) -> Snail:
        (executor,) = self.worker(name)._executors.values()
        assert isinstance(executor, Snail)
        return executor

    def kill(self, *names: str) -> None:
        for name in names:
            self.swarm.network.kill(PeerId(name))
            self.killed.add(name)

    async def freed(self, deadline_s: float = 2.0) -> None:
        """Every session is freed on every node, in time; and so is every place in the clients' count of loads."""
        alive = [node.worker for name, node in self.swarm.nodes.items() if name not in self.killed]
        await until(lambda: not any(len(worker.sessions) for worker in alive), deadline_s)
        for worker in alive:
            worker.sessions.check()
            assert not worker._replays
            assert all(not executor._caches for executor in worker._executors.values())  # type: ignore[attr-defined]
        assert not any(generator._spares._held for generator, _ in self.swarm.clients)
        for view in self.swarm.views:
            assert not view._loads._own


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


ALL = ("b0", "b1", "b2")


def spares(client: Generator) -> dict[str, Spare]:
    """Those of the client's only answer."""
    (held,) = client._spares._held.values()
    return {str(peer): spare for peer, spare in held.spares.items()}


class Talk:
    """One answer, read as far as a test wants."""

    def __init__(self, scene: Scene, client: Generator, options: SamplingOptions) -> None:
        self.scene, self.client = scene, client
        self.stats = Stats()
        self.stream: AsyncGenerator[Piece, None] = client.stream(LONG, options, self.stats)
        self.tokens: list[int | None] = []
        self.gap_s = 0.0

    async def hear(self, tokens: int) -> None:
        for _ in range(tokens):
            started_s = running_s()
            self.tokens.append((await asyncio.wait_for(anext(self.stream), 10)).token)
            self.gap_s = max(self.gap_s, running_s() - started_s)

    async def warm(self, *names: str) -> None:
        """Until these spares have had all that has come through, and nobody else is one."""

        def ready() -> bool:
            held = spares(self.client)
            (reader,) = self.client._readers.values()
            workers = [self.scene.worker(name) for name in names]
            return (
                held.keys() == set(names)
                and all(spare.link is not None and not spare.leading for spare in held.values())
                and all(session.done >= reader.through for worker in workers for session in worker.sessions.all())
            )

        await until(ready)

    async def rest(self) -> list[int | None]:
        self.gap_s = 0.0
        await self.hear(GREEDY.max_tokens - len(self.tokens))
        assert await anext(self.stream, None) is None
        return self.tokens


async def begun(scene: Scene, options: SamplingOptions = GREEDY, *warm: str) -> Talk:
    talk = Talk(scene, scene.client(), options)
    await talk.hear(16)
    await talk.warm(*warm)
    talk.gap_s = 0.0
    return talk


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("lost", [("a0",), ("a1",), ("a2",), ("a0", "a2")])
async def test_a_killed_stage_is_replaced_with_nothing_computed_again(
    scene: Scene, lost: Sequence[str], options: SamplingOptions, record_property: Callable[[str, object], None]
) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, options)
    talk = await begun(scene, options, *ALL)
    before = {name: node.worker.rows for name, node in scene.swarm.nodes.items()}
    scene.kill(*lost)
    assert await talk.rest() == undisturbed
    record_property("gap_s", round(talk.gap_s, 4))
    assert talk.gap_s < 0.3
    assert [hop.peer for hop in talk.stats.route] == [f"{'b' if f'a{n}' in lost else 'a'}{n}" for n in range(3)]
    assert talk.client.warm_repairs == talk.client.repairs == len(lost)
    await scene.freed()
    to_come = GREEDY.max_tokens - 16
    for name in {"b0", "b1", "b2", "a0", "a1", "a2"} - set(lost):
        assert scene.worker(name).rows - before[name] <= to_come + FEW * len(lost), name


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_a_silent_stage(scene: Scene, lost: str) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.swarm.network.freeze(PeerId(lost))
    await talk.hear(10)
    scene.swarm.network.sound(PeerId(lost))
    assert await talk.rest() == undisturbed
    assert (talk.client.repairs, talk.client.warm_repairs) == (1, 1)
    await scene.freed()


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_a_stage_that_sends_what_cannot_be_read(scene: Scene, lost: str) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    worker = scene.worker(lost)
    assert isinstance(worker, FaultyWorker)
    worker.garbled = True
    assert await talk.rest() == undisturbed
    assert lost not in [hop.peer for hop in talk.stats.route]
    assert talk.client.warm_repairs >= 1
    await scene.freed()


@pytest.mark.parametrize("leaving", ["a0", "a1", "a2"])
async def test_a_stage_that_leaves_in_good_order(scene: Scene, leaving: str) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.worker(leaving).leave()
    assert await talk.rest() == undisturbed
    assert (talk.client.repairs, talk.client.warm_repairs) == (1, 1)
    await scene.freed()


async def test_after_a_repair_there_are_spares_again(scene: Scene) -> None:
    """A second loss, and of a stage whose spare has got another neighbour before it, is repaired as the first."""
    await scene.start(*ALL)
    await scene.add("c1")
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.kill("a1")
    await talk.hear(10)
    await talk.warm("b0", "c1", "b2")
    before = scene.worker("b2").rows
    scene.kill("a2")
    await talk.hear(10)
    await talk.warm("b0", "c1")
    scene.kill("b1")
    assert await talk.rest() == undisturbed
    assert [hop.peer for hop in talk.stats.route] == ["a0", "c1", "b2"]
    assert talk.client.warm_repairs == 3
    assert scene.worker("b2").rows - before <= GREEDY.max_tokens - 26 + 3 * FEW
    await scene.freed()


@pytest.mark.parametrize("lost", [("a0", "a1"), ("a1", "a2"), ("a0", "a1", "a2")])
async def test_stages_that_follow_one_another_are_replaced_though_not_at_once(
    scene: Scene, lost: Sequence[str]
) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.kill(*lost)
    assert await talk.rest() == undisturbed
    await scene.freed()


async def test_where_only_another_stages_spare_is_left_it_takes_the_place(scene: Scene) -> None:
    await scene.start()
    wide = Snail(scene.wide, dtype="float32")
    await scene.swarm.add_node("wide", wide, block_count=CUTS[-1], context_tokens=512, block_time_s=1.0)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, "wide")
    assert spares(talk.client)["wide"].hop.blocks == BlockRange(0, 2)
    scene.kill("a1")
    assert await talk.rest() == undisturbed
    assert [hop.peer for hop in talk.stats.route] == ["a0", "wide", "a2"]
    await scene.freed()


@pytest.mark.parametrize("spare", ["b0", "b1", "b2"])
async def test_a_spare_that_dies_is_not_missed(scene: Scene, spare: str) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.kill(spare)
    await talk.hear(5)
    await talk.warm(*(set(ALL) - {spare}))
    assert talk.gap_s < 0.3
    assert await talk.rest() == undisturbed
    assert (talk.client.repairs, [hop.peer for hop in talk.stats.route]) == (0, ["a0", "a1", "a2"])
    await scene.freed()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_spare_that_dies_with_its_stage(scene: Scene, number: int) -> None:
    await scene.start(*ALL)
    await scene.add(f"c{number}")
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.kill(f"a{number}", f"b{number}")
    assert await talk.rest() == undisturbed
    assert talk.stats.route[number].peer == f"c{number}"
    await scene.freed()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_spare_that_is_silent_when_it_is_needed(scene: Scene, number: int) -> None:
    await scene.start(*ALL)
    await scene.add(f"c{number}")
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.swarm.network.freeze(PeerId(f"b{number}"))
    scene.kill(f"a{number}")
    await talk.hear(10)
    assert talk.gap_s < 3
    scene.swarm.network.sound(PeerId(f"b{number}"))
    assert await talk.rest() == undisturbed
    assert talk.stats.route[number].peer == f"c{number}"
    await scene.freed()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_spare_that_falls_silent_is_given_up(
    scene: Scene, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsns.client.spares.LOOK_S", 0.05)
    monkeypatch.setattr("bsns.client.spares.PING_S", 0.1)
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    scene.swarm.network.freeze(PeerId(f"b{number}"))
    await talk.warm(*(set(ALL) - {f"b{number}"}))
    scene.swarm.network.sound(PeerId(f"b{number}"))
    assert await talk.rest() == undisturbed
    assert talk.client.repairs == 0
    await scene.freed()


async def test_a_spare_that_does_not_keep_up_is_given_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, *ALL)
    # not before: until it has the prompt, a spare is as far behind as that is long
    monkeypatch.setattr("bsns.client.spares.LOOK_S", 0.02)
    monkeypatch.setattr("bsns.client.spares.MOST_BEHIND", 4)
    (held,) = talk.client._spares._held.values()
    held.news.set()
    scene.worker("b1")._short_s = 0.0  # so that it computes on its thread, as a slow node does
    scene.snail("b1").delay_s = 0.5
    while "b1" in spares(talk.client):  # or until the answer has ended, which fails
        await talk.hear(1)
        await asyncio.sleep(0.02)
    assert talk.gap_s < 0.3
    scene.snail("b1").delay_s = 0.0
    assert await talk.rest() == undisturbed
    assert talk.client.repairs == 0
    await until(lambda: not scene.worker("b1")._busy)
    await scene.freed()


async def test_with_nobody_there_an_answer_goes_on_without(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets a spare as soon as one comes."""
    monkeypatch.setattr("bsns.client.spares.LOOK_S", 0.05)
    await scene.start("b0")
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, "b0")
    await talk.hear(5)
    await scene.add("b1")
    scene.swarm.views[-1]._read_s = -1e9  # what is known of the swarm grows old
    await talk.client._spares._find_route(1, (), BlockRange(0, 2), True)
    scene.swarm.views[-1].release((scene.swarm.nodes["a0"].hop,))
    await talk.warm("b0", "b1")
    assert await talk.rest() == undisturbed
    await scene.freed()


async def test_a_full_node_is_no_spare(scene: Scene) -> None:
    await scene.start("b0", "b2")
    await scene.add("b1", cache_tokens=100)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    talk = await begun(scene, GREEDY, "b0", "b2")
    assert await talk.rest() == undisturbed
    await scene.freed()


async def test_a_node_that_is_fuller_than_it_says_is_no_spare(scene: Scene) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(warm=False), LONG, GREEDY)
    scene.worker("b1").sessions.resize(100)
    talk = await begun(scene, GREEDY, "b0", "b2")
    assert await talk.rest() == undisturbed
    await scene.freed()


@pytest.mark.parametrize("after", [0, 1, 16])
async def test_an_answer_given_up_is_freed_on_spares_too(scene: Scene, after: int) -> None:
    await scene.start(*ALL)
    talk = Talk(scene, scene.client(), GREEDY)
    task = asyncio.create_task(talk.hear(after + 1))
    await until(lambda: len(talk.tokens) >= after)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await talk.stream.aclose()
    await scene.freed()


async def test_many_answers_at_once(scene: Scene) -> None:
    await scene.start(*ALL)
    prompts = [prompt(4 + n, seed=n) for n in range(6)]
    client = scene.client()
    undisturbed = [await answer(scene.client(warm=False), one, SEEDED) for one in prompts]
    tasks = [asyncio.create_task(answer(client, one, SEEDED)) for one in prompts]
    steps = scene.worker("b1").steps
    await until(lambda: scene.worker("b1").steps > steps + 20)
    scene.kill("a1")
    assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == undisturbed
    await scene.freed()


async def test_a_spare_that_is_computing_the_step_under_way_costs_nobody_his_place(scene: Scene) -> None:
    """The first stage dies while its spare computes the same step, whose rows it was not told to bring back."""
    await scene.start(*ALL)
    expected = await answer(scene.client(warm=False), LONG, SEEDED)
    client = scene.client()
    stream = client.stream(LONG, SEEDED)
    tokens = [(await anext(stream)).token for _ in range(10)]
    (held,) = client._spares._held.values()
    await until(lambda: len(held.spares) == 3 and all(spare.link for spare in held.spares.values()))
    (reader,) = client._readers.values()
    for name in ("a0", "b0"):
        scene.snail(name).delay_s = 0.2
        scene.worker(name).block_time_s = 0.1  # on the thread
    tokens += [(await anext(stream)).token for _ in range(3)]
    spare = scene.worker("b0").sessions.get(reader.session.id)
    assert spare is not None
    await until(lambda: spare.end == reader.sent and spare.done < spare.end and spare.waiting == 0)
    scene.snail("a0").delay_s = 0.0
    scene.kill("a0")
    await until(lambda: client.repairs >= 1)
    scene.snail("b0").delay_s = 0.0
    tokens += [piece.token async for piece in stream]
    assert tokens == expected
    assert reader.former == {PeerId("a0")}
    await scene.freed()


async def test_a_first_spare_is_credited_with_what_it_was_sent_and_stands() -> None:
    began: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
    may_end = asyncio.Semaphore(0)

    async def send_rows(reader: Reader, link: Link, start: int, end: int) -> None:
        began.put_nowait((start, end))
        await may_end.acquire()

    spares = Spares(*cast("Any", (None, None, None)), send_rows)
    reader = cast("Reader", SimpleNamespace(sent=10, session=SimpleNamespace(id=SessionId(1))))
    spare = Spare(Hop(PeerId("a"), BlockRange(0, 1), ()), (None, None), link=cast("Link", object()))
    held = spares._held[SessionId(1)] = _Held({spare.hop.peer: spare})
    spare.feeding = asyncio.create_task(spares._feed(reader, held, spare))
    async with asyncio.timeout(5):
        assert await began.get() == (0, 10)
        assert spare.sent == 0  # were it taken now, all would have to be sent
        spares.fed(reader, 4)  # the guesses from there on were wrong
        may_end.release()
        assert await began.get() == (4, 10)
        assert spare.sent == 4
        may_end.release()
        await until(lambda: spare.sent == 10)
    spare.feeding.cancel()
    await asyncio.gather(spare.feeding, return_exceptions=True)
