"""Answers that outlive their nodes: the same tokens, and nothing computed again but the lost range."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf, answer, until
from running_time import running_s
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.pieces import Piece, Stats
from bsns.client.reader import CHUNK_ROWS
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CacheFull, MissingBlocks, PeerLost, PeerSlow, PeerTimedOut, PromptTooLong
from bsns.core.ids import PeerId
from bsns.protocol.inference import Open
from bsns.transport.port import Stream
from bsns.worker.batching import Batch
from bsns.worker.clients import report
from bsns.worker.faults import FaultyWorker
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
GREEDY = SamplingOptions(max_tokens=40)
SEEDED = SamplingOptions(max_tokens=40, temperature=1.0, top_p=0.9, seed=7)


class Scene:
    """Three stages, `a0` to `a2`, which clients prefer, and for each a spare, `b0` to `b2`."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm = swarm
        self.stages = shelf.stages(path, CUTS)
        self.wide = shelf.stage(path, BlockRange(2, 5))
        self.ends = shelf.ends(path)
        self.killed: set[str] = set()

    async def start(self, *spares: str, context_tokens: int = 512) -> None:
        for number in range(len(self.stages)):
            for kind in "ab":
                name = f"{kind}{number}"
                if kind == "a" or name in spares:
                    await self.add(name, context_tokens=context_tokens)

    async def add(self, name: str, context_tokens: int = 512) -> None:
        executor = TorchExecutor(self.stages[int(name[1])], dtype="float32")
        slow = 1e-3 if name[0] == "a" else 1.0  # far beyond what pings may differ
        await self.swarm.add_node(
            name, executor, block_count=CUTS[-1], context_tokens=context_tokens, block_time_s=slow, kind=FaultyWorker
        )

    def client(self, **options: float) -> Generator:
        return self.swarm.client(self.ends, context_tokens=512, **options)  # type: ignore[arg-type]

    def kill(self, *names: str) -> None:
        for name in names:
            self.swarm.network.kill(PeerId(name))
            self.killed.add(name)

    def rows(self) -> dict[str, int]:
        return {name: node.worker.rows for name, node in self.swarm.nodes.items()}

    async def freed(self) -> None:
        alive = [node.worker for name, node in self.swarm.nodes.items() if name not in self.killed]
        await until(lambda: not any(len(worker.sessions) for worker in alive))
        for worker in alive:
            worker.sessions.check()
            assert all(not executor._caches for executor in worker._executors.values())  # type: ignore[attr-defined]


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


ALL = ("b0", "b1", "b2")


async def rest(stream: AsyncGenerator[Piece, None]) -> list[int]:
    return [piece.token async for piece in stream if piece.token is not None]


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "lost", [("a0",), ("a1",), ("a2",), ("a0", "a1"), ("a1", "a2"), ("a0", "a2"), ("a0", "a1", "a2")]
)
async def test_the_tokens_are_those_of_an_undisturbed_answer(
    scene: Scene, lost: Sequence[str], options: SamplingOptions
) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), options)
    stats = Stats()
    stream = scene.client().stream(prompt(9), options, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    before = scene.rows()
    scene.kill(*lost)
    tokens += await asyncio.wait_for(rest(stream), 10)
    assert tokens == undisturbed
    assert [hop.peer for hop in stats.route] == [f"{'b' if f'a{n}' in lost else 'a'}{n}" for n in range(3)]
    await scene.freed()
    after = scene.rows()
    for n in range(3):
        kept, spare = f"a{n}", f"b{n}"
        if kept in lost:
            # all that had been said, and what was still to come; once more where a second loss showed only later
            assert 9 + 39 <= after[spare] <= (9 + 39) * len(lost) + 2
        else:
            assert after[spare] == 0
            assert after[kept] - before[kept] <= 30 + 2, "nothing is computed again by those that stay"


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
@pytest.mark.parametrize("after", [0, 1, 2])
async def test_a_stage_lost_during_a_prompt(scene: Scene, lost: str, after: int) -> None:
    """Before its first chunk, and with one or two of three through the lost stage."""
    await scene.start(*ALL)
    tokens = prompt(2 * CHUNK_ROWS + 50)
    options = SamplingOptions(max_tokens=5)
    undisturbed = await answer(scene.client(), tokens, options)
    node = scene.swarm.nodes[lost].worker
    already = node.steps
    stream = scene.client().stream(tokens, options)
    first = asyncio.create_task(anext(stream))
    await until(lambda: node.steps - already >= after and len(node.sessions) > 0)
    scene.kill(lost)
    said = [(await asyncio.wait_for(first, 10)).token, *await asyncio.wait_for(rest(stream), 10)]
    assert said == undisturbed
    await scene.freed()


@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_logits_survive_as_well(scene: Scene, lost: str) -> None:
    await scene.start(*ALL)
    tokens = prompt(2 * CHUNK_ROWS + 50)
    expected = torch.cat([rows async for rows in scene.client().logits(tokens)])
    found = []
    async for rows in scene.client().logits(tokens):
        found.append(rows)
        if len(found) == 1:
            scene.kill(lost)
    assert torch.allclose(torch.cat(found), expected, atol=1e-5)
    await scene.freed()


async def test_a_spare_that_dies_as_well_is_replaced_by_the_next(scene: Scene) -> None:
    await scene.start("b1")
    await scene.add("c1")
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(5)]
    scene.kill("a1")
    tokens += [(await anext(stream)).token for _ in range(5)]
    scene.kill("b1")
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    await scene.freed()


async def test_where_only_a_neighbour_has_the_lost_blocks_it_takes_them_as_well(scene: Scene) -> None:
    """The last stage's node holds the middle one's blocks too, but no node is on a route twice."""
    await scene.start()
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    scene.kill("a2")
    wide = TorchExecutor(scene.wide, dtype="float32")
    await scene.swarm.add_node("wide", wide, block_count=CUTS[-1], context_tokens=512, block_time_s=1.0)
    scene.swarm.directory.shelf.pop(PeerId("a2"))
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    assert [(hop.peer, str(hop.blocks)) for hop in stats.route] == [("a0", "0:2"), ("a1", "2:3"), ("wide", "3:5")]
    scene.kill("a1")
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    assert [(hop.peer, str(hop.blocks)) for hop in stats.route] == [("a0", "0:2"), ("wide", "2:5")]
    await scene.freed()


async def test_many_answers_at_once(scene: Scene) -> None:
    await scene.start(*ALL)
    prompts = [prompt(4 + n, seed=n) for n in range(6)]
    client = scene.client()
    undisturbed = [await answer(client, one, SEEDED) for one in prompts]
    tasks = [asyncio.create_task(answer(client, one, SEEDED)) for one in prompts]
    steps = scene.swarm.nodes["a1"].worker.steps
    await until(lambda: scene.swarm.nodes["a1"].worker.steps > steps + 20)
    scene.kill("a1")
    assert await asyncio.wait_for(asyncio.gather(*tasks), 10) == undisturbed
    await scene.freed()


async def test_with_no_spare_the_answer_waits_for_one(scene: Scene) -> None:
    await scene.start()
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    scene.kill("a1")
    waiting = asyncio.create_task(rest(stream))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await scene.add("b1")
    assert tokens + await asyncio.wait_for(waiting, 10) == undisturbed
    await scene.freed()


async def test_with_no_spare_in_time_the_error_names_the_blocks(scene: Scene) -> None:
    await scene.start()
    stream = scene.client(deadline_s=1.0).stream(prompt(9), GREEDY)
    await anext(stream)
    scene.kill("a1")
    with pytest.raises(MissingBlocks, match="2:3"):
        await asyncio.wait_for(rest(stream), 5)
    await scene.freed()


@pytest.mark.parametrize("frozen", [("a0",), ("a1",), ("a2",), ("a0", "a2"), ("a0", "a1", "a2")])
async def test_a_frozen_node_is_found_by_its_silence(scene: Scene, frozen: Sequence[str]) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    for name in frozen:
        scene.swarm.network.freeze(PeerId(name))
    started_s = running_s()
    tokens.append((await asyncio.wait_for(anext(stream), 10)).token)
    assert running_s() - started_s < 5
    tokens += [(await anext(stream)).token for _ in range(5)]
    for name in frozen:
        scene.swarm.network.sound(PeerId(name))  # what it says now comes too late
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    await scene.freed()


@pytest.mark.parametrize("ends", [("a0", "a1"), ("a1", "a2")])
async def test_a_way_between_two_nodes_that_is_cut(scene: Scene, ends: tuple[str, str]) -> None:
    """Both answer the client, but what one sends does not reach the other."""
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    scene.swarm.network.silence(*map(PeerId, ends))
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    await scene.freed()


class Snail(TorchExecutor):
    """An executor that can be told to be slow."""

    delay_s = 0.0

    def run(self, batch: Batch) -> list[memoryview]:
        time.sleep(self.delay_s)  # a compute thread that is slow, not a test that waits
        return super().run(batch)


@pytest.mark.parametrize("with_spare", [True, False])
async def test_a_node_that_grows_slow_is_replaced_if_it_can_be(scene: Scene, with_spare: bool) -> None:
    await scene.start(*(ALL if with_spare else ()))
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    snail = Snail(scene.stages[1], dtype="float32")
    worker = scene.swarm.nodes["a1"].worker
    worker._executors[snail.blocks] = snail
    worker._short_s = 0.0  # so that it computes on its thread, as a slow node does
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(36)]
    snail.delay_s = 2.5
    assert tokens + await asyncio.wait_for(rest(stream), 20) == undisturbed
    assert stats.route[1].peer == ("b1" if with_spare else "a1")
    await until(lambda: not worker._busy)
    await scene.freed()


async def test_a_node_that_says_it_is_busy_and_computes_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is believed for a while."""
    monkeypatch.setattr("bsns.client.fault.BUSY_S", 2.5)
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(20)]
    worker = scene.swarm.nodes["a1"].worker

    async def lie() -> None:
        while True:
            worker.tally.steps += 1
            await asyncio.sleep(0.05)

    monkeypatch.setattr(worker, "_compute", lambda: None)
    lying = asyncio.create_task(lie())
    began_s = time.monotonic()
    tokens.append((await asyncio.wait_for(anext(stream), 15)).token)
    took_s = time.monotonic() - began_s
    assert tokens + await rest(stream) == undisturbed
    assert took_s >= 2.5
    assert stats.route[1].peer == "b1"
    lying.cancel()
    await scene.freed()


async def test_a_slow_stage_and_the_next_are_replaced_together(scene: Scene) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    client, stats = scene.client(), Stats()
    stream = client.stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(5)]
    (reader,) = client._readers.values()
    client._repairs.lose(reader, PeerId("a0"), PeerSlow("it is slow").about(PeerId("a0")))
    client._repairs.lose(reader, PeerId("a1"), PeerTimedOut("it is silent").about(PeerId("a1")))
    assert tokens + await rest(stream) == undisturbed
    assert [hop.peer for hop in stats.route] == ["b0", "b1", "a2"]
    await scene.freed()


@pytest.mark.parametrize("lying", [("a0",), ("a1",), ("a2",), ("a0", "a1")])
async def test_a_node_that_sends_what_cannot_be_read(scene: Scene, lying: Sequence[str]) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    for name in lying:
        worker = scene.swarm.nodes[name].worker
        assert isinstance(worker, FaultyWorker)
        worker.garbled = True
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    assert not {hop.peer for hop in stats.route} & set(lying)
    await scene.freed()


@pytest.mark.parametrize("leaving", [("a0",), ("a1",), ("a2",), ("a0", "a1")])
async def test_a_node_that_leaves_hands_its_sessions_over(scene: Scene, leaving: Sequence[str]) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    workers = [scene.swarm.nodes[name].worker for name in leaving]
    for worker in workers:
        worker.leave()
    await until(lambda: not any(len(worker.sessions) for worker in workers))
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    assert not {hop.peer for hop in stats.route} & set(leaving)
    await scene.freed()


async def test_a_node_that_leaves_serves_on_where_nobody_can_take_over(scene: Scene) -> None:
    await scene.start()
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    scene.swarm.nodes["a1"].worker.leave()
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    await scene.freed()


async def test_a_client_whose_own_network_is_gone_for_a_while_goes_on_where_it_was(scene: Scene) -> None:
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    client = scene.client()
    stats = Stats()
    stream = client.stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    (own,) = [transport.peer for generator, transport in scene.swarm.clients if generator is client]
    scene.swarm.network.freeze(own)
    waiting = asyncio.create_task(rest(stream))
    await asyncio.sleep(2.5)
    assert not waiting.done()
    scene.swarm.network.sound(own)
    assert tokens + await asyncio.wait_for(waiting, 10) == undisturbed
    assert [hop.peer for hop in stats.route] == ["a0", "a1", "a2"]
    assert client.repairs == 0
    await scene.freed()


async def test_two_hundred_answers_at_once_on_a_full_swarm(scene: Scene) -> None:
    """There is room for ten: whoever is refused hears so, whoever is not is answered, and nobody is forgotten."""
    for number, name in enumerate(("a0", "a1", "a2")):
        executor = TorchExecutor(scene.stages[number], dtype="float32")
        await scene.swarm.add_node(name, executor, block_count=CUTS[-1], context_tokens=512, cache_tokens=10 * 24)
    client = scene.client()
    options = SamplingOptions(max_tokens=20)
    undisturbed = await answer(client, prompt(4), options)
    tasks = [answer(client, prompt(4), options) for _ in range(200)]
    outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    answered = [outcome for outcome in outcomes if outcome == undisturbed]
    refused = [outcome for outcome in outcomes if isinstance(outcome, CacheFull)]
    assert len(answered) >= 10
    assert len(answered) + len(refused) == 200
    await scene.freed()


async def test_an_answer_given_up_is_freed_though_a_stage_is_frozen(scene: Scene) -> None:
    await scene.start()
    stream = scene.client().stream(prompt(9), GREEDY)
    for _ in range(5):
        await anext(stream)
    scene.swarm.network.freeze(PeerId("a1"))
    started_s = running_s()
    await stream.aclose()
    others = [scene.swarm.nodes[name].worker for name in ("a0", "a2")]
    await until(lambda: not any(len(worker.sessions) for worker in others), 2.0)
    assert running_s() - started_s < 2.0
    scene.swarm.network.sound(PeerId("a1"))
    await scene.freed()


async def test_many_dead_nodes_that_are_still_announced_do_not_keep_an_answer_from_beginning(scene: Scene) -> None:
    await scene.start(*ALL)
    dead = ["a0", "a1", "a2", *(f"a{n}{twin}" for n in range(3) for twin in "xy")]
    for name in dead[3:]:
        await scene.add(name)
    scene.kill(*dead)
    stats = Stats()
    said = [piece async for piece in scene.client().stream(prompt(9), GREEDY, stats)]
    assert (len(said), [hop.peer for hop in stats.route]) == (40, ["b0", "b1", "b2"])
    await scene.freed()


@pytest.mark.parametrize("error", [PromptTooLong("shorten it"), PeerLost("gone").about(PeerId("stranger"))])
async def test_a_stage_cannot_end_an_answer_by_what_it_says(scene: Scene, error: BsnsError) -> None:
    """It is taken for its own failure, whatever it says and of whom."""
    await scene.start(*ALL)
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stream = scene.client().stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    worker = scene.swarm.nodes["a1"].worker
    (session,) = worker.sessions.all()
    worker._clients.report(session, error)
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    await scene.freed()


async def test_two_short_outages_of_the_clients_network_are_two(scene: Scene) -> None:
    await scene.start(*ALL)
    client = scene.client()
    stream = client.stream(prompt(9), GREEDY)
    (own,) = [transport.peer for generator, transport in scene.swarm.clients if generator is client]
    for _ in range(2):
        await anext(stream)
        scene.swarm.network.freeze(own)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(2.2)
        scene.swarm.network.sound(own)
        await asyncio.wait_for(waiting, 5)
    assert client.repairs == 0
    await stream.aclose()
    await scene.freed()


async def test_a_spare_that_freezes_while_it_is_asked_is_passed_by(scene: Scene) -> None:
    await scene.start("b1")
    await scene.add("c1")
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    client = scene.client()
    stream = client.stream(prompt(9), GREEDY)
    tokens = [(await anext(stream)).token for _ in range(10)]
    scene.swarm.network.freeze(PeerId("b1"))
    scene.kill("a1")
    assert tokens + await asyncio.wait_for(rest(stream), 15) == undisturbed
    scene.swarm.network.sound(PeerId("b1"))
    await scene.freed()


class Slanderer(FaultyWorker):
    """A spare that opens no session, and says each time that somebody else is to blame."""

    blamed = "a2"

    def _open(self, stream: Stream, message: Open) -> None:
        report(stream, message.session, PeerLost("gone").about(PeerId(self.blamed)))


@pytest.mark.parametrize("blamed", ["a2", "ghost"])
async def test_a_spare_that_slanders_others_is_passed_by(
    scene: Scene, blamed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.start("b1", "b2")
    monkeypatch.setattr(Slanderer, "blamed", blamed)
    executor = TorchExecutor(scene.stages[1], dtype="float32")
    await scene.swarm.add_node(
        "liar", executor, block_count=CUTS[-1], context_tokens=512, block_time_s=0.5, kind=Slanderer
    )
    undisturbed = await answer(scene.client(), prompt(9), GREEDY)
    stats = Stats()
    stream = scene.client().stream(prompt(9), GREEDY, stats)
    tokens = [(await anext(stream)).token for _ in range(10)]
    scene.kill("a1")
    assert tokens + await asyncio.wait_for(rest(stream), 10) == undisturbed
    assert stats.route[1].peer == "b1"
    assert not any(peer.startswith("ghost") for view in scene.swarm.views for peer in view._grudges._held)
    await scene.freed()
