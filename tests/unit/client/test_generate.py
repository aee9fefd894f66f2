"""The generator over a small real swarm: what streams, what it costs, and what reaches the reader when things fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf, answer, until
from running_time import running_s
from tiny_models import prompt

from bsns.client import opening as module
from bsns.client.generate import Generator
from bsns.client.pieces import Piece, Stats
from bsns.client.reader import CHUNK_ROWS
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import (
    BadOption,
    BsnsError,
    CacheFull,
    MissingBlocks,
    PeerError,
    PeerFailed,
    PeerTimedOut,
    PeerUnreachable,
    PromptTooLong,
    SwarmError,
)
from bsns.core.ids import PeerId
from bsns.protocol.codecs import coded
from bsns.protocol.inference import Close, Closed, Open, Opened, Part, Result, Step
from bsns.protocol.tensors import TensorSpec
from bsns.routing.chain import Hop, Route
from bsns.transport.port import Stream
from bsns.worker.batching import Batch
from bsns.worker.torch_executor import TorchExecutor

DEADLINE_S = 5.0
CUTS = (0, 2, 5)


class Moody(TorchExecutor):
    """An executor that can be told to raise, or to answer no numbers."""

    mood: str = "fine"

    def run(self, batch: Batch) -> list[memoryview]:
        if self.mood == "raises":
            raise RuntimeError("no memory")
        outputs = super().run(batch)
        if self.mood == "nan":
            return [memoryview(b"\xff" * output.nbytes) for output in outputs]
        if self.mood == "dawdles":
            time.sleep(0.15)  # a compute thread that is slow, not a test that waits
        return outputs


class Scene:
    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm, self.shelf, self.path = swarm, shelf, path
        self.executors: list[Moody] = []
        self.ends = shelf.ends(path)

    async def start(self, **options: int) -> None:
        for stage in self.shelf.stages(self.path, CUTS):
            self.executors.append(Moody(stage, dtype="float32"))
            name = f"node-{len(self.swarm.nodes)}"
            await self.swarm.add_node(name, self.executors[-1], block_count=CUTS[-1], **options)

    def reserved(self) -> int:
        return sum(
            node.worker.sessions.cache_tokens - node.worker.sessions.cache_tokens_left
            for node in self.swarm.nodes.values()
        )

    async def freed(self) -> None:
        await until(lambda: not self.reserved())
        for executor in self.executors:
            assert executor._caches == {}


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


async def test_pieces_and_stats(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    stats = Stats()
    pieces = [piece async for piece in client.stream(prompt(6), SamplingOptions(max_tokens=9), stats)]
    assert [piece.finished for piece in pieces] == [None] * 8 + ["length"]
    assert "".join(piece.text for piece in pieces) == client.prompts.tokenizer.decode([p.token for p in pieces])
    assert (stats.prompt_tokens, stats.tokens) == (6, 9)
    assert [hop.peer for hop in stats.route] == ["node-0", "node-1"]
    assert len(stats.turns_ms) == 9
    assert len(stats.own_ms_per_hop()) == 8
    assert stats.tokens_per_s > 0
    assert 0 < stats.ttft_ms < 1e3 * DEADLINE_S
    await scene.freed()


class Even:
    """Lets an answer hold even tokens only, and remembers them."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        return logits_V.masked_fill(torch.arange(len(logits_V)) % 2 == 1, -torch.inf)

    def accept(self, token: int) -> None:
        self.told.append(token)


async def test_a_constraint_rules_its_answer_alone(scene: Scene) -> None:
    await scene.start()
    client, options = scene.swarm.client(scene.ends), SamplingOptions(max_tokens=12, temperature=1.0, seed=3)
    free = await answer(client, prompt(6), options)
    constraint = Even()
    bound, beside = await asyncio.gather(
        tokens_of(client.stream(prompt(6), options, constraint=constraint)), answer(client, prompt(6), options)
    )
    assert beside == free
    assert any(token % 2 for token in free)
    assert constraint.told == bound
    assert all(token % 2 == 0 for token in bound)


async def tokens_of(pieces: AsyncIterator[Piece]) -> list[int]:
    return [piece.token async for piece in pieces if piece.token is not None]


async def test_logprobs_of_every_token(scene: Scene) -> None:
    await scene.start()
    client, asked = scene.swarm.client(scene.ends), SamplingOptions(max_tokens=5, logprobs=2)
    pieces = [piece async for piece in client.stream(prompt(6), asked)]
    told = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    assert len(told) == 5
    assert [each.top[0] for each in told] == [(p.token, each.chosen) for p, each in zip(pieces, told, strict=True)]
    silent = [piece async for piece in client.stream(prompt(6), SamplingOptions(max_tokens=5))]
    assert [piece.token for piece in silent] == [piece.token for piece in pieces]
    assert all(piece.logprobs is None for piece in silent)


@pytest.mark.parametrize(
    ("tokens", "options"), [([10**6], SamplingOptions()), ([1], SamplingOptions(logit_bias=((10**6, 1.0),)))]
)
async def test_a_token_that_the_model_does_not_have(scene: Scene, tokens: list[int], options: SamplingOptions) -> None:
    await scene.start()
    with pytest.raises(BadOption, match="no token 1000000"):
        await answer(scene.swarm.client(scene.ends), tokens, options)


async def test_an_end_token_ends_the_answer_and_is_not_said(scene: Scene) -> None:
    await scene.start()
    tokens = await answer(scene.swarm.client(scene.ends), prompt(6), SamplingOptions(max_tokens=12))
    end = next(token for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    client = scene.swarm.client(scene.ends, end_tokens={end})
    pieces = [piece async for piece in client.stream(prompt(6), SamplingOptions(max_tokens=12))]
    assert [piece.token for piece in pieces] == tokens[: tokens.index(end) + 1]
    assert (pieces[-1].text, pieces[-1].finished) == ("", "stop")
    await scene.freed()


async def test_a_stop_string_ends_the_answer(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    text = "".join([p.text async for p in client.stream(prompt(6), SamplingOptions(max_tokens=30))])
    stop = text[7:9]
    pieces = [p async for p in client.stream(prompt(6), SamplingOptions(max_tokens=30, stop=(stop,)))]
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finished == "stop"
    await scene.freed()


async def test_the_context_bounds_the_answer(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends, context_tokens=20)
    assert len(await answer(client, prompt(15), SamplingOptions(max_tokens=99))) == 5
    for length in (20, 21, 500):
        with pytest.raises(PromptTooLong, match="context holds 20"):
            await answer(client, prompt(length), SamplingOptions())
    with pytest.raises(PromptTooLong):
        await anext(client.logits(prompt(21)))
    with pytest.raises(BadOption):
        await answer(client, [], SamplingOptions())
    assert [node.worker.rows for node in scene.swarm.nodes.values()] == [15 + 4] * 2


async def test_a_long_prompt_goes_in_chunks(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    await answer(client, prompt(CHUNK_ROWS + 2), SamplingOptions(max_tokens=1))
    worker = scene.swarm.nodes["node-0"].worker
    assert (worker.steps, worker.rows) == (2, CHUNK_ROWS + 2)


async def test_a_reader_that_stops_frees_its_session_at_once(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    stream = client.stream(prompt(6), SamplingOptions(max_tokens=200))
    await anext(stream)
    assert scene.reserved() == 2 * 206
    await stream.aclose()
    await scene.freed()
    cancelled = asyncio.create_task(answer(client, prompt(6), SamplingOptions(max_tokens=200)))
    rows = scene.swarm.nodes["node-1"].worker.rows
    await until(lambda: scene.swarm.nodes["node-1"].worker.rows > rows + 8)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    await scene.freed()


async def test_readers_that_stop_disturb_nobody(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    expected = await answer(client, prompt(6), SamplingOptions(max_tokens=60))

    async def stop_early(seed: int) -> None:
        stream = client.stream(prompt(6, seed), SamplingOptions(max_tokens=100))
        for _ in range(1 + seed % 7):
            await anext(stream)
        await stream.aclose()

    outcomes = await asyncio.gather(
        *(answer(client, prompt(6), SamplingOptions(max_tokens=60)) for _ in range(3)),
        *(stop_early(seed) for seed in range(20)),
    )
    assert outcomes[:3] == [expected] * 3
    await scene.freed()


async def test_closing_the_client_frees_everything(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    stream = client.stream(prompt(6), SamplingOptions(max_tokens=200))
    await anext(stream)
    await client.close()
    await scene.freed()
    await stream.aclose()


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("mood", "error", "words"),
    [("raises", MissingBlocks, "nobody else can serve blocks .*computing blocks .* failed"), ("nan", PeerFailed, ".")],
)
async def test_what_a_stage_does_wrong_reaches_the_reader(
    scene: Scene, stage: int, mood: str, error: type[BsnsError], words: str
) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends, deadline_s=1.0)
    stream = client.stream(prompt(6), SamplingOptions(max_tokens=50))
    await anext(stream)
    scene.executors[stage].mood = mood
    with pytest.raises(error, match=words):
        async for _ in stream:
            pass
    await scene.freed()
    scene.executors[stage].mood = "fine"
    assert len(await answer(client, prompt(6), SamplingOptions(max_tokens=3))) == 3


@pytest.mark.parametrize("dead", ["node-0", "node-1"])
async def test_a_node_that_dies_and_has_no_spare_reaches_the_reader(scene: Scene, dead: str) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends, deadline_s=1.0)
    stream = client.stream(prompt(6), SamplingOptions(max_tokens=200))
    await anext(stream)
    scene.swarm.network.kill(PeerId(dead))
    started_s = running_s()
    with pytest.raises(MissingBlocks, match=f"it is needed because .*{dead}"):
        async for _ in stream:
            pass
    assert running_s() - started_s < DEADLINE_S
    alive = next(node for name, node in scene.swarm.nodes.items() if name != dead)
    await until(lambda: len(alive.worker.sessions) == 0)


async def test_a_route_without_an_answer_ends_at_the_deadline(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends, deadline_s=0.05)
    scene.executors[1].mood = "dawdles"
    with pytest.raises(PeerTimedOut, match="node-0, node-1"):
        await answer(client, prompt(6), SamplingOptions())
    await scene.freed()


@pytest.mark.parametrize("how", ["full", "dead", "nonsense"])
async def test_a_node_that_refuses_is_avoided_and_it_alone(scene: Scene, how: str) -> None:
    """The directory does not know yet what has become of node-1, which is faster than the spare."""
    await scene.start(cache_tokens=200)
    spare = Moody(scene.shelf.stage(scene.path, BlockRange(2, 5)), dtype="float32")
    scene.executors.append(spare)
    await scene.swarm.add_node("spare", spare, block_count=5, cache_tokens=200)
    records = scene.swarm.directory.shelf
    records[PeerId("spare")] = msgspec.structs.replace(records[PeerId("spare")], block_time_s=1.0)
    client = scene.swarm.client(scene.ends)
    stats = Stats()
    await _said(client, stats)
    assert [hop.peer for hop in stats.route] == ["node-0", "node-1"]
    await scene.freed()
    if how == "full":
        scene.swarm.nodes["node-1"].worker.sessions.cache_tokens = 10
    elif how == "nonsense":
        scene.swarm.nodes["node-1"].worker.sessions.context_tokens = 0  # answers every Open with BadFrame
    else:
        scene.swarm.network.kill(PeerId("node-1"))
    await _said(client, stats)
    assert [hop.peer for hop in stats.route] == ["node-0", "spare"]
    await scene.freed()


async def _said(client: Generator, stats: Stats) -> None:
    said = [piece async for piece in client.stream(prompt(6), SamplingOptions(max_tokens=8), stats)]
    assert len(said) == 8


async def test_a_swarm_that_is_fuller_than_it_announced_says_how_full(scene: Scene) -> None:
    await scene.start()
    scene.swarm.nodes["node-1"].worker.sessions.cache_tokens = 10
    with pytest.raises(CacheFull, match="node-1: 14 tokens of cache asked for, 10 of 10 left"):
        await answer(scene.swarm.client(scene.ends), prompt(6), SamplingOptions(max_tokens=8))
    await scene.freed()


async def test_no_room_and_no_nodes(scene: Scene) -> None:
    client = scene.swarm.client(scene.ends)
    with pytest.raises(MissingBlocks):
        await answer(client, prompt(6), SamplingOptions())
    await scene.start(cache_tokens=20)
    client = scene.swarm.client(scene.ends)
    with pytest.raises(CacheFull):
        await answer(client, prompt(6), SamplingOptions(max_tokens=100))
    assert len(await answer(client, prompt(6), SamplingOptions(max_tokens=14))) == 14


async def _logits(client: Generator, tokens: list[int]) -> torch.Tensor:
    return torch.cat([rows async for rows in client.logits(tokens)])


@pytest.mark.parametrize("start", [0, 3, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 5, 2 * CHUNK_ROWS + 9])
async def test_logits_from_a_position_on(scene: Scene, start: int) -> None:
    await scene.start(context_tokens=512)
    client, tokens = scene.swarm.client(scene.ends, context_tokens=512), prompt(2 * CHUNK_ROWS + 10)
    whole = torch.cat([rows async for rows in client.logits(tokens)])
    assert len(whole) == len(tokens)
    found = torch.cat([rows async for rows in client.logits(tokens, start)])
    torch.testing.assert_close(found, whole[start:])
    for outside in (-1, len(tokens)):
        with pytest.raises(BadOption, match="no position"):
            await anext(aiter(client.logits(tokens, outside)))
    await scene.freed()


async def test_logits_beside_answers(scene: Scene) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    tokens = prompt(6)
    said = await answer(client, tokens, SamplingOptions(max_tokens=10))
    logits_NV, again = await asyncio.gather(
        _logits(client, tokens + said), answer(client, tokens, SamplingOptions(max_tokens=10))
    )
    assert again == said
    assert logits_NV[len(tokens) - 1 : -1].argmax(-1).tolist() == said
    await scene.freed()


@pytest.mark.parametrize(
    ("shape", "codec"), [((1, 16), "raw"), ((1, 64), "raw"), ((2, 32), "raw"), ((1, 32), "int8"), ((1, 32), "bf16")]
)
async def test_a_stage_whose_results_have_another_size_or_codec_is_replaced(
    scene: Scene, shape: tuple[int, int], codec: str
) -> None:
    """A last stage that lies about its rows, beside one that does not."""
    await scene.start()
    liar = scene.swarm.network.transport("liar")

    async def lie(stream: Stream) -> None:
        while True:
            message, _ = await stream.receive()
            if isinstance(message, Open):
                await stream.send(Opened(message.session, 1))
            elif isinstance(message, Step):
                (part,) = message.parts
                spec = coded("hidden", "float32", shape, codec)
                lied = Part(part.session, part.position, part.rows, shape[0])
                await stream.send(Result((lied,), (spec,)), [bytes(spec.nbytes)])
            elif isinstance(message, Close):
                await stream.send(Closed(message.session, 1))

    await liar.listen(lie)
    client = scene.swarm.client(scene.ends)
    expected = await answer(client, prompt(6), SamplingOptions(max_tokens=20))
    logits = await _logits(client, prompt(6))
    honest = client.stream(prompt(6), SamplingOptions(max_tokens=20))
    await anext(honest)
    client._opener._find_route = lambda *_: _route(Hop(PeerId("liar"), BlockRange(0, 5), ()))
    assert await answer(client, prompt(6), SamplingOptions(max_tokens=9)) == expected[:9]  # the liar is replaced
    assert torch.equal(await _logits(client, prompt(6)), logits)
    assert len([piece async for piece in honest]) == 19


@pytest.mark.parametrize("wanted", [0, 2])
async def test_rows_a_stage_did_not_ask_for_cost_their_session_a_repair_alone(scene: Scene, wanted: int) -> None:
    """The first stage asks the last for other rows than the client did; the last, an honest one, returns them."""
    await scene.start()
    client = scene.swarm.client(scene.ends)
    expected = await answer(client, prompt(6), SamplingOptions(max_tokens=50))
    honest = client.stream(prompt(6), SamplingOptions(max_tokens=20))
    await anext(honest)
    last = await client.links.to(PeerId("node-1"))
    session = next(iter(client._readers))
    stream = client.stream(prompt(6), SamplingOptions(max_tokens=50))
    first = await anext(stream)
    other = next(id_ for id_ in client._readers if id_ != session)
    spec = TensorSpec.raw("hidden", "float32", (2, 32))
    held = scene.swarm.nodes["node-1"].worker.sessions.get(other)
    assert held is not None
    last.post(Step((Part(other, held.end, 2, wanted),), (spec,)), [bytes(spec.nbytes)])
    assert [first.token, *[piece.token async for piece in stream]] == expected
    assert len([piece async for piece in honest]) == 19


async def test_a_stage_that_only_says_it_is_coming_is_replaced_or_ends_at_the_deadline(scene: Scene) -> None:
    """A last stage that reports a prompt's chunk as come through again and again, and never a row."""
    await scene.start()
    liar = scene.swarm.network.transport("liar")

    async def lull(stream: Stream) -> None:
        while True:
            message, _ = await stream.receive()
            if isinstance(message, Open):
                await stream.send(Opened(message.session, 1))
            elif isinstance(message, Step):
                part = msgspec.structs.replace(message.parts[0], wanted=0)
                for _ in range(100):
                    await stream.send(Result((part,), (TensorSpec.raw("hidden", "float32", (0, 32)),)))
                    await asyncio.sleep(0.05)

    await liar.listen(lull)
    client, hasty = scene.swarm.client(scene.ends), scene.swarm.client(scene.ends, deadline_s=0.2)
    for each in (client, hasty):
        each._opener._find_route = lambda *_: _route(Hop(PeerId("liar"), BlockRange(0, 5), ()))
    said = await asyncio.wait_for(answer(client, prompt(6), SamplingOptions(max_tokens=3)), 3)
    assert len(said) == 3  # by others
    scene.swarm.network.kill(PeerId("node-1"))
    with pytest.raises((PeerError, SwarmError)):
        await asyncio.wait_for(answer(hasty, prompt(6), SamplingOptions()), 3)


async def _route(*hops: Hop) -> Route:
    return hops


async def test_a_node_that_another_cannot_reach_yet_is_waited_for(scene: Scene) -> None:
    """Nodes that come up together: the first dialled the second too early, and does not dial it again for a while."""
    await scene.start()
    client = scene.swarm.client(scene.ends)
    network, (one, other) = scene.swarm.network, [node.hop.peer for node in scene.swarm.nodes.values()]
    usual = await answer(client, prompt(8), SamplingOptions(max_tokens=4))
    network.cut(one, other)
    asked = asyncio.create_task(answer(client, prompt(8), SamplingOptions(max_tokens=4)))
    await asyncio.sleep(0.1)
    assert not asked.done()
    network.heal(one, other)
    assert await asked == usual


async def test_a_node_that_another_cannot_reach_at_all_is_an_error_within_seconds(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNREACHED_S", 0.3)
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    await scene.start()
    client = scene.swarm.client(scene.ends)
    scene.swarm.network.cut(*(node.hop.peer for node in scene.swarm.nodes.values()))
    with pytest.raises(PeerUnreachable):
        await answer(client, prompt(8), SamplingOptions(max_tokens=4))
    await scene.freed()


async def test_a_node_that_is_silent_for_a_moment_and_the_only_one_is_asked_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    usual = await answer(client, prompt(8), SamplingOptions(max_tokens=4))
    monkeypatch.setattr(module, "OPEN_S", 0.1)
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    peer = next(iter(scene.swarm.nodes.values())).hop.peer
    scene.swarm.network.freeze(peer)
    asked = asyncio.create_task(answer(client, prompt(8), SamplingOptions(max_tokens=4)))
    await asyncio.sleep(0.3)
    assert not asked.done()
    scene.swarm.network.sound(peer)
    assert await asked == usual
    await scene.freed()


async def test_the_only_node_frozen_for_good_is_an_error_within_seconds(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.start()
    client = scene.swarm.client(scene.ends)
    await answer(client, prompt(8), SamplingOptions(max_tokens=4))
    for name, seconds in (("OPEN_S", 0.1), ("AGAIN_S", 0.05), ("UNREACHED_S", 0.3)):
        monkeypatch.setattr(module, name, seconds)
    peer = next(iter(scene.swarm.nodes.values())).hop.peer
    scene.swarm.network.freeze(peer)
    with pytest.raises(PeerTimedOut):
        await asyncio.wait_for(answer(client, prompt(8), SamplingOptions(max_tokens=4)), 5)
    scene.swarm.network.sound(peer)
    await scene.freed()
