"""Answers whose activations travel in fewer bits: whole, token-exact over losses, loud about what is no number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf, answer, until
from tiny_models import prompt

from bsns.client.finding import ChooseCodec
from bsns.client.generate import Generator
from bsns.client.reader import CHUNK_ROWS
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.model.tensors import to_memory
from bsns.protocol.codecs import CODECS
from bsns.protocol.frames import Buffer, Message
from bsns.protocol.inference import Result
from bsns.worker.batching import Batch
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
OPTIONS = SamplingOptions(max_tokens=40)


class Poisoned(TorchExecutor):
    """One block of it gives a number that is none, once it is told to."""

    block: int | None = None

    def run(self, batch: Batch) -> list[memoryview]:
        outputs = super().run(batch)
        if self.block is None or self.block not in range(batch.blocks.start, batch.blocks.end):
            return outputs
        poisoned = []
        for output in outputs:
            values = np.frombuffer(bytearray(output), np.float32)
            values[0] = np.nan
            poisoned.append(memoryview(values).cast("B"))
        return poisoned


def mixed(sender: PeerId | None, receiver: PeerId | None) -> str:
    """Another codec on every way; on those to and from nodes that come later too."""
    names = sorted(CODECS)
    return names[sum(map(ord, f"{sender}>{receiver}")) % len(names)]


class Scene:
    """Three stages, `a0` to `a2`, which clients prefer, and for each a spare, `b0` to `b2`."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm = swarm
        self.stages = shelf.stages(path, CUTS)
        self.ends = shelf.ends(path)
        self.executors: dict[str, Poisoned] = {}

    async def start(self, *spares: str) -> None:
        for name in ("a0", "a1", "a2", *spares):
            self.executors[name] = executor = Poisoned(self.stages[int(name[1])], dtype="float32")
            slow = 1e-3 if name[0] == "a" else 1.0
            await self.swarm.add_node(name, executor, block_count=CUTS[-1], context_tokens=512, block_time_s=slow)

    def client(self, choose: ChooseCodec | str, deadline_s: float = 20.0) -> Generator:
        if isinstance(choose, str):
            codec = choose
            return self.client(lambda sender, receiver: codec, deadline_s)
        return self.swarm.client(self.ends, context_tokens=512, deadline_s=deadline_s, choose_codec=choose)

    async def logits(self, choose: ChooseCodec | str, tokens: Sequence[int]) -> torch.Tensor:
        return torch.cat([rows async for rows in self.client(choose).logits(tokens)])


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


@pytest.mark.parametrize(
    ("codec", "most"),
    [("raw", 1e-6), ("bf16", 0.02), ("int8", 0.02), ("int8-dyn", 0.05), ("int8-rot", 0.02), ("int4", 0.3)],
)
async def test_logits_are_off_by_what_the_codec_loses(scene: Scene, codec: str, most: float) -> None:
    await scene.start()
    tokens = prompt(CHUNK_ROWS + 20)
    exact, found = await scene.logits("raw", tokens), await scene.logits(codec, tokens)
    error = float((found - exact).norm() / exact.norm())
    assert error <= most
    assert (error > 0) == (codec != "raw")


@pytest.mark.parametrize("lost", [("a0",), ("a1",), ("a2",), ("a0", "a1"), ("a1", "a2")])
@pytest.mark.parametrize("choose", ["int8", mixed], ids=["int8", "mixed"])
async def test_an_answer_goes_on_as_it_was_where_stages_are_lost(
    scene: Scene, choose: ChooseCodec | str, lost: Sequence[str]
) -> None:
    """The journal holds what was sent: what is computed again is computed from the same numbers."""
    await scene.start("b0", "b1", "b2")
    undisturbed = await answer(scene.client(choose), prompt(9), OPTIONS)
    stream = scene.client(choose).stream(prompt(9), OPTIONS)
    tokens = [(await anext(stream)).token for _ in range(10)]
    for name in lost:
        scene.swarm.network.kill(PeerId(name))
    tokens += [piece.token async for piece in stream]
    assert tokens == undisturbed


async def test_many_answers_at_once_on_ways_of_their_own(scene: Scene) -> None:
    """A batch of sessions in several codecs parts them again."""
    await scene.start()
    clients = [scene.client(codec) for codec in CODECS]
    alone = [await answer(client, prompt(9), OPTIONS) for client in clients]
    together = await asyncio.gather(*(answer(client, prompt(9), OPTIONS) for client in (*clients, *clients)))
    assert list(together) == [*alone, *alone]


@pytest.mark.parametrize("block", [2, 3, 4])
async def test_a_block_that_gives_no_numbers_is_named(scene: Scene, block: int) -> None:
    await scene.start()
    for executor in scene.executors.values():
        if block in range(executor.blocks.start, executor.blocks.end):
            executor.block = block
    with pytest.raises(BsnsError, match=f"block {block} gives numbers that are not finite"):
        await answer(scene.client("int8", deadline_s=2.0), prompt(9), OPTIONS)
    await until(lambda: not any(len(node.worker.sessions) for node in scene.swarm.nodes.values()))


async def test_it_is_replaced_where_another_has_the_block(scene: Scene) -> None:
    await scene.start("b1")
    undisturbed = await answer(scene.client("int8"), prompt(9), OPTIONS)
    stream = scene.client("int8").stream(prompt(9), OPTIONS)
    tokens = [(await anext(stream)).token for _ in range(5)]
    scene.executors["a1"].block = 2
    tokens += [piece.token async for piece in stream]
    assert tokens == undisturbed


async def test_one_answers_numbers_are_no_others_trouble(scene: Scene) -> None:
    """Numbers that are none come from one answer's tokens, in a batch with others."""
    await scene.start()
    executor = scene.executors["a1"]
    undisturbed = await answer(scene.client("int8"), prompt(9), OPTIONS)
    run = executor.run

    def poison_long(batch: Batch) -> list[memoryview]:
        outputs = run(batch)
        bad = to_memory(torch.full((1, executor.hidden_size), torch.nan))
        return [
            memoryview(bytes(bad) * work.part.rows) if work.session.max_tokens == 50 else output
            for work, output in zip(batch.works, outputs, strict=True)
        ]

    executor.run = poison_long  # type: ignore[method-assign]
    client = scene.client("int8", deadline_s=2.0)
    good = [asyncio.create_task(answer(client, prompt(9), OPTIONS)) for _ in range(4)]
    with pytest.raises(BsnsError, match="not finite"):
        await answer(client, prompt(9), SamplingOptions(max_tokens=41))
    assert await asyncio.gather(*good) == [undisturbed] * 4


async def test_a_way_keeps_its_codec_where_both_its_ends_are_replaced(scene: Scene) -> None:
    """Though another would be chosen for the new ones: spares of either would not be understood."""
    await scene.start("b0", "b1", "b2")
    late = ("c1", "c2")

    def choose(sender: PeerId | None, receiver: PeerId | None) -> str:
        return "raw" if sender in late and receiver in late else "int8"

    options = SamplingOptions(max_tokens=200)
    undisturbed = await answer(scene.client("int8"), prompt(9), options)
    client = scene.swarm.client(scene.ends, context_tokens=512, choose_codec=choose, warm_spares=True)
    stream = client.stream(prompt(9), options)
    tokens = [(await anext(stream)).token]
    (reader,) = client._readers.values()
    held = client._spares._held[reader.session.id]

    async def warm() -> None:
        """One token after the other, until every stage has a spare."""
        for _ in range(60):
            tokens.append((await anext(stream)).token)
            await asyncio.sleep(0.01)
            covered = {spare.hop.blocks for spare in held.spares.values() if spare.link is not None}
            if covered == {hop.blocks for hop in reader.session.route}:
                return
        raise AssertionError(list(held.spares))

    await warm()
    for name in late:
        scene.executors[name] = executor = Poisoned(scene.stages[int(name[1])], dtype="float32")
        await scene.swarm.add_node(name, executor, block_count=CUTS[-1], context_tokens=512, block_time_s=1e-4)
    view = scene.swarm.views[-1]
    view._read_s = float("-inf")
    await view.records()
    for name in ("a1", "a2"):
        scene.swarm.network.kill(PeerId(name))
    while [hop.peer for hop in reader.session.route] != ["a0", *late]:
        tokens.append((await anext(stream)).token)
    (held_by_c1,) = scene.swarm.nodes["c1"].worker.sessions.all()
    assert held_by_c1.gives == "int8"
    await warm()
    scene.swarm.network.kill(PeerId("c1"))
    tokens += [piece.token async for piece in stream]
    assert tokens == undisturbed
    assert [hop.peer for hop in reader.session.route] == ["a0", "b1", "c2"]
    assert client.warm_repairs == 1


@pytest.mark.parametrize("how", ["no numbers over a plain way", "scales that are no numbers"])
async def test_who_sent_what_is_no_number_is_to_blame(scene: Scene, how: str) -> None:
    """Not the stage that received it, which would be replaced for nothing."""
    await scene.start("b0", "b1")
    undisturbed = await answer(scene.client("int8"), prompt(9), OPTIONS)

    def choose(sender: PeerId | None, receiver: PeerId | None) -> str:
        return "raw" if how.startswith("no numbers") and sender in ("a0", "b0") else "int8"

    client = scene.client(choose)
    stream = client.stream(prompt(9), OPTIONS)
    tokens = [(await anext(stream)).token for _ in range(5)]
    (reader,) = client._readers.values()
    if how.startswith("no numbers"):
        scene.executors["a0"].block = 1
    else:
        relay = scene.swarm.nodes["a0"].worker._relay
        post = relay.post

        def spoil(peer: PeerId, message: Message, buffers: Sequence[Buffer] = ()) -> None:
            post(peer, message, [b"\xff\xff" + bytes(buffer)[2:] for buffer in buffers])

        relay.post = spoil  # type: ignore[method-assign]
    tokens += [piece.token async for piece in stream]
    assert len(tokens) == len(undisturbed)
    assert [hop.peer for hop in reader.session.route][:2] == ["b0", "a1"]


async def test_a_row_that_is_none_costs_its_own_answer_a_repair_alone(scene: Scene) -> None:
    """In a frame with others' rows, some of which come before it."""
    await scene.start("b2")
    client = scene.client("int8", deadline_s=4.0)
    alone = [await answer(client, prompt(9 + n), OPTIONS) for n in range(4)]
    clients = scene.swarm.nodes["a2"].worker._clients
    post, spoiled = clients.post, []

    def spoil(peer: PeerId, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        if isinstance(message, Result) and len(buffers) >= 2 and not spoiled:
            spoiled.append(message.parts[-1].session)
            buffers = [*buffers[:-1], b"\xff\xff" + bytes(buffers[-1])[2:]]
        post(peer, message, buffers)

    clients.post = spoil  # type: ignore[method-assign]
    together = await asyncio.gather(*(answer(client, prompt(9 + n), OPTIONS) for n in range(4)))
    assert spoiled
    assert list(together) == alone
