"""Every family that the native kernels have a row for computes what the model library's own layers compute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from memory_swarm import MemorySwarm, StageShelf, answer
from native_stages import NativeRun, Part, TorchRun, needs_native
from tiny_models import FAMILIES as TINY
from tiny_models import prompt, reference

from bsns.client.prompts import Prompts
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.model.attention import Int8KVCache
from bsns.model.checkpoint import read_checkpoint
from bsns.model.ends import Ends
from bsns.model.source import resolve
from bsns.model.stage import Stage
from bsns.native.architecture import NotNative
from bsns.native.families import FAMILIES
from bsns.native.stage import NativeStage
from bsns.node.ends import load_ends
from bsns.node.executors import Choice, load_executor
from bsns.worker.native_executor import NativeExecutor

pytestmark = needs_native
TinyModel = Callable[[str], Path]
TOLERANCE = 1e-4
NATIVE = [family for family, (model_type, _) in TINY.items() if model_type in FAMILIES]
OTHERS = [family for family in TINY if family not in NATIVE]

BATCHES: list[list[Part]] = [
    [Part("a", 0, 9)],
    [Part("b", 0, 1), Part("a", 9, 1), Part("c", 0, 20)],
    [Part("a", 10, 13), Part("c", 20, 1), Part("b", 1, 1)],
    [Part("a", 23, 1), Part("b", 2, 1), Part("c", 21, 1), Part("d", 0, 2)],
    [Part("c", 5, 3, draft=1), Part("a", 24, 1)],  # c goes back, and on from there
    [Part("d", 2, 40), Part("c", 8, 1, draft=1)],
    [Part("a", 25, 1), Part("d", 42, 1), Part("c", 9, 1)],
]
"""Prompts in chunks, several sessions in a batch, windows that are left behind, a step back."""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each row is off, as a part of its length."""
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


@pytest.mark.parametrize("family", NATIVE)
def test_a_stage_equals_the_librarys(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    whole = BlockRange(0, checkpoint.block_count)
    native = NativeRun(NativeStage(checkpoint, whole, dtype="float32", threads=2))
    library = TorchRun(Stage(path, whole, dtype="float32"))
    for parts in BATCHES:
        for actual, expected in zip(native.batch(parts), library.batch(parts), strict=True):
            assert float(expected.std()) > 0.3, "outputs so flat would prove little"
            assert float((actual - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_cache_in_int8_loses_as_little_in_both(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    whole = BlockRange(0, checkpoint.block_count)
    stage = Stage(path, whole, dtype="float32")
    native = NativeRun(NativeStage(checkpoint, whole, dtype="float32", cache="int8", threads=2))
    library, exact = TorchRun(stage, new_cache=Int8KVCache), TorchRun(stage)
    for parts in BATCHES:
        batches = (run.batch(parts) for run in (native, library, exact))
        for ours, theirs, expected in zip(*batches, strict=True):
            for actual in (ours, theirs):
                assert 0 < float(relative(actual, expected).max()) < 0.03
            assert float(relative(ours, theirs).max()) < 0.03


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2"])
def test_weights_in_int8_are_the_same_in_both(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    whole = BlockRange(0, checkpoint.block_count)
    native = NativeRun(NativeStage(checkpoint, whole, dtype="float32", weights="int8", threads=2, kept=False))
    library, exact = (TorchRun(Stage(path, whole, dtype="float32", quant=quant)) for quant in ("int8", "none"))
    for parts in BATCHES:
        batches = (run.batch(parts) for run in (native, library, exact))
        for ours, theirs, expected in zip(*batches, strict=True):
            for actual in (ours, theirs):  # of models so small that a single rounding shows
                assert 0 < float(relative(actual, expected).max()) < 0.1
            assert float(relative(ours, theirs).max()) < 0.05


@pytest.mark.parametrize("family", NATIVE)
def test_bfloat16_loses_no_more_than_the_librarys(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    whole = BlockRange(0, checkpoint.block_count)
    native = NativeRun(NativeStage(checkpoint, whole, dtype="bfloat16", threads=2))
    rounded, exact = (TorchRun(Stage(path, whole, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    ours, theirs = [], []
    for parts in BATCHES:
        for actual, other, expected in zip(native.batch(parts), rounded.batch(parts), exact.batch(parts), strict=True):
            ours.append(relative(actual, expected))
            theirs.append(relative(other, expected))
    # of the mean row: what is rounded off may send a row between two experts to the other one
    assert float(torch.cat(ours).mean()) <= 2e-2
    assert float(torch.cat(ours).mean()) <= 1.1 * float(torch.cat(theirs).mean())


@pytest.mark.parametrize("family", NATIVE)
def test_parts_of_a_range(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    held = BlockRange(1, checkpoint.block_count)
    native = NativeRun(NativeStage(checkpoint, held, dtype="float32", threads=2))
    library = TorchRun(Stage(path, held, dtype="float32"))
    for blocks in (BlockRange(1, 3), BlockRange(2, 3), BlockRange(3, checkpoint.block_count)):
        for step, parts in enumerate(BATCHES[:4]):
            parts = [Part(f"{part.session}{blocks}", part.position, part.rows) for part in parts]
            for actual, expected in zip(native.batch(parts, blocks), library.batch(parts, blocks), strict=True):
                assert float((actual - expected).abs().max()) <= TOLERANCE, step


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_without_a_row_is_refused(family: str, tiny_model: TinyModel) -> None:
    with pytest.raises(NotNative, match=f"model type {TINY[family][0]}"):
        NativeStage(read_checkpoint(tiny_model(family)), BlockRange(0, 1))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
async def test_a_swarm_of_native_nodes_equals_the_library(
    family: str, tiny_model: TinyModel, shelf: StageShelf, swarm: MemorySwarm
) -> None:
    path = tiny_model(family)
    checkpoint = read_checkpoint(path)
    cuts = (0, 1, 3, checkpoint.block_count)
    for start, end in pairwise(cuts):
        executor = NativeExecutor(NativeStage(checkpoint, BlockRange(start, end), dtype="float32"))
        await swarm.add_node(f"node-{start}", executor, block_count=checkpoint.block_count)
    client, tokens = swarm.client(shelf.ends(path)), prompt(150)
    with torch.inference_mode():
        expected = reference(path)(torch.tensor([tokens])).logits[0]
    actual = torch.cat([rows async for rows in client.logits(tokens)])
    assert float((actual - expected).abs().max()) <= 1e-4
    prompts = [prompt(length, seed=length) for length in (3, 20, 140)]
    options = SamplingOptions(max_tokens=12)
    together = await asyncio.gather(*(answer(client, tokens, options) for tokens in prompts))
    assert together == [await answer(client, tokens, options) for tokens in prompts]
    executors = [executor for node in swarm.nodes.values() for executor in node.worker._executors.values()]
    async with asyncio.timeout(5):  # the last session's end is on its way
        while any(executor._caches for executor in executors):  # noqa: ASYNC110  an executor tells nobody
            await asyncio.sleep(0.01)


async def test_the_same_answer_of_256_tokens() -> None:
    """Of the built-in model in float32, from native blocks and a native head and from the library's."""
    source = resolve("smollm2-135m")
    whole = BlockRange(0, source.block_count)
    answers = []
    for name, ends in (("native", load_ends(source, dtype="float32")), ("torch", Ends(source.path, dtype="float32"))):
        executor = load_executor(Choice(name), source, whole, dtype="float32", device="cpu", threads=2)
        members = MemorySwarm()
        await members.add_node(name, executor, block_count=source.block_count, context_tokens=512)
        tokens = Prompts(source.path).encode("The lighthouse keeper looked out over the sea and")
        client = members.client(ends, context_tokens=512)
        answers.append(await answer(client, tokens, SamplingOptions(max_tokens=256)))
        await members.close()
    assert len(answers[0]) == 256
    assert answers[0] == answers[1]
