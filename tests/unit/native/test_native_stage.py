"""The native stage: a row's result is its own, caches go back, mistakes are told, everything is freed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from native_stages import KERNELS, TOKENS, NativeRun, Part, library, needs_native, rows_of
from tiny_models import FAMILIES, make_model

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadRange, CorruptModel
from bsns.model.checkpoint import Checkpoint, read_checkpoint
from bsns.native.library import Misuse
from bsns.native.stage import NativeStage, Segment

pytestmark = needs_native
TinyModel = Callable[[str], Path]

# Odd sizes in every direction: heads and MLPs that have to be padded, hidden states that fill no whole line.
UNEVEN = {
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "hidden_size": 120,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
KINDS = [("float32", "same"), ("bfloat16", "same"), ("bfloat16", "int8"), ("float32", "int8"), ("bfloat16", "int4")]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(make_model(tmp_path_factory.mktemp("uneven"), "llama", UNEVEN))


def stage(checkpoint: Checkpoint, **options: object) -> NativeStage:
    return NativeStage(checkpoint, BlockRange(0, checkpoint.block_count), kept=False, **options)  # type: ignore[arg-type]


def in_chunks(session: str, chunks: Sequence[int], draft: int = 0) -> list[Part]:
    starts = [sum(chunks[:number]) for number in range(len(chunks))]
    return [Part(session, start, rows, draft) for start, rows in zip(starts, chunks, strict=True)]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "weights"), KINDS, ids="/".join)
@pytest.mark.parametrize("cache", ["same", "int8"])
def test_a_row_is_the_same_in_every_batch(
    dtype: str, weights: str, cache: str, kernels: str, uneven: Checkpoint
) -> None:
    """However a prompt is cut, whoever is beside it, and on however many threads: bit by bit."""
    one = NativeRun(stage(uneven, dtype=dtype, weights=weights, cache=cache, kernels=kernels))
    expected = torch.cat([one.batch([part])[0] for part in in_chunks("a", [1] * 44)])
    many = NativeRun(stage(uneven, dtype=dtype, weights=weights, cache=cache, kernels=kernels, threads=3))
    for number, chunks in enumerate(([44], [7, 1, 36], [16, 16, 12], [3, 2, 1, 17, 1, 20])):
        many.caches.pop("a", None)
        actual = []
        for step, part in enumerate(in_chunks("a", chunks)):
            beside = [Part(f"{number} {step} {other}", 0, rows) for other, rows in enumerate((1, 5, 18))]
            parts = [*beside[: step + 1], part, *beside[step + 1 :]]
            actual.append(many.batch(parts)[parts.index(part)])
        assert torch.equal(torch.cat(actual), expected), chunks


@pytest.mark.parametrize("family", ["gemma3", "mixtral", "gpt_neox", "gpt2"])
def test_a_row_is_the_same_in_every_family(family: str, tiny_model: TinyModel) -> None:
    for dtype, weights in KINDS:
        run = NativeRun(stage(read_checkpoint(tiny_model(family)), dtype=dtype, weights=weights, threads=2))
        whole = run.batch([Part("a", 0, 30)])[0]
        run.caches.clear()
        parts = in_chunks("a", [5, 1, 1, 23])
        cut = [run.batch([Part(f"beside {part.position}", 0, 9), part])[1] for part in parts]
        assert torch.equal(torch.cat(cut), whole), (dtype, weights)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "gpt_neox"])
def test_a_row_is_the_same_wherever_the_model_is_cut(family: str, tiny_model: TinyModel) -> None:
    """So an answer does not depend on its route, nor on who takes a lost stage's place."""
    checkpoint = read_checkpoint(tiny_model(family))
    for dtype, weights in KINDS:
        run = NativeRun(stage(checkpoint, dtype=dtype, weights=weights))
        parts = [Part("a", 0, 30)]
        whole = run.batch(parts)
        rows = run.batch(parts, BlockRange(0, 1))
        for block in range(1, checkpoint.block_count):
            rows = run.batch(parts, BlockRange(block, block + 1), rows)
        assert torch.equal(rows[0], whole[0]), (dtype, weights)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_row_is_the_same_beside_more_experts_than_they_are_wide(weights: str, tmp_path: Path) -> None:
    options = FAMILIES["qwen3_moe"][1] | {"num_experts": 40, "moe_intermediate_size": 24}
    checkpoint = read_checkpoint(make_model(tmp_path, "qwen3_moe", options))
    whole = NativeRun(stage(checkpoint, dtype="float32", weights=weights)).batch([Part("a", 0, 20)])[0]
    run = NativeRun(stage(checkpoint, dtype="float32", weights=weights))
    assert torch.equal(torch.cat([run.batch([part])[0] for part in in_chunks("a", [1] * 20)]), whole)


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_set_of_kernels_computes_the_same_but_for_rounding(kernels: str, uneven: Checkpoint) -> None:
    parts = [Part("a", 0, 20), Part("b", 0, 1)]
    for dtype, weights in KINDS:
        best, this = (
            torch.cat(NativeRun(stage(uneven, dtype=dtype, weights=weights, kernels=name)).batch(parts))
            for name in (KERNELS[-1], kernels)
        )
        tolerance = 1e-5 if (dtype, weights) == ("float32", "same") else 2e-2
        assert float((this - best).norm() / best.norm()) <= tolerance, (dtype, weights)


def test_a_step_back_overwrites_what_was_there(uneven: Checkpoint) -> None:
    run = NativeRun(stage(uneven, dtype="float32"))
    first = run.batch([Part("a", 0, 30)])[0]
    other = run.batch([Part("a", 12, 6, draft=1)])[0]
    assert not torch.equal(other, first[12:18])
    again = [run.batch([part])[0] for part in (Part("a", 12, 10), Part("a", 22, 8))]
    assert torch.equal(torch.cat(again), first[12:])


@pytest.mark.parametrize(("dtype", "weights"), KINDS, ids="/".join)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_with_their_session(
    poison: float, dtype: str, weights: str, uneven: Checkpoint
) -> None:
    for kernels in KERNELS:
        parts = [Part("a", 0, 3), Part("bad", 0, 5), Part("c", 0, 20)]
        run = NativeRun(stage(uneven, dtype=dtype, weights=weights, kernels=kernels, threads=2))
        sound = run.batch(parts)
        run.caches.clear()
        rows = [rows_of(part, uneven.hidden_size) for part in parts]
        rows[1][2, 7] = poison
        for _ in range(2):  # what was left in working memory does no harm either
            run.caches.clear()
            actual = run.batch(parts, rows=rows)
            assert torch.equal(actual[0], sound[0])
            assert torch.equal(actual[2], sound[2])
            assert not actual[1][2].isfinite().any(), kernels
            run.caches.clear()
            assert all(map(torch.equal, run.batch(parts), sound))


def test_a_poisoned_session_that_goes_back_is_sound(uneven: Checkpoint) -> None:
    run = NativeRun(stage(uneven, dtype="bfloat16"))
    sound = run.batch([Part("a", 0, 20)])[0]
    run.caches.clear()
    run.batch([Part("a", 0, 11)])
    run.batch([Part("a", 11, 9)], rows=[torch.full((9, uneven.hidden_size), float("nan"))])
    assert torch.equal(run.batch([Part("a", 11, 9)])[0], sound[11:])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "cache"), [("float32", "same"), ("bfloat16", "same"), ("bfloat16", "int8")])
def test_a_row_is_not_touched_by_those_after_it(dtype: str, cache: str, kernels: str, uneven: Checkpoint) -> None:
    run = NativeRun(stage(uneven, dtype=dtype, cache=cache, kernels=kernels))
    sound = run.batch([Part("a", 0, 20)])[0]
    poisoned = rows_of(Part("a", 0, 20), uneven.hidden_size)
    poisoned[11:] = float("nan")
    run.caches.clear()
    assert torch.equal(run.batch([Part("a", 0, 20)], rows=[poisoned])[0][:11], sound[:11])


def test_ranges_that_are_not_there(uneven: Checkpoint) -> None:
    with pytest.raises(BadRange, match="0:2"):
        NativeStage(uneven, BlockRange(1, 3))
    held = NativeStage(uneven, BlockRange(0, 1), dtype="float32")
    with pytest.raises(BadRange, match="0:1"):
        held.run([Segment(held.open(4), 0, 1)], bytes(held.row_bytes), BlockRange(1, 2))


def test_mistakes_are_told(uneven: Checkpoint) -> None:
    run = stage(uneven, dtype="float32")
    cache = run.open(8)
    row = bytes(run.row_bytes)
    with pytest.raises(Misuse, match="beyond its cache"):
        run.run([Segment(cache, 8, 1)], row)
    with pytest.raises(Misuse, match="beyond its cache"):
        run.run([Segment(cache, 6, 3)], row * 3)
    with pytest.raises(Misuse, match="rows"):
        run.run([Segment(cache, 0, 2)], row)
    with pytest.raises(Misuse, match="position"):
        run.run([Segment(cache, -1, 1)], row)
    with pytest.raises(Misuse, match="another stage"):
        run.run([Segment(NativeStage(uneven, BlockRange(0, 1), dtype="float32").open(8), 0, 1)], row)
    with pytest.raises(Misuse, match="tokens"):
        run.open(0)
    assert len(run.run([Segment(cache, 7, 1)], row)) == run.row_bytes
    cache.close()
    cache.close()
    with pytest.raises(Misuse, match="closed"):
        run.run([Segment(cache, 0, 1)], row)
    with pytest.raises(Misuse, match="no kernels"):
        stage(uneven, kernels="abacus")
    run.close()
    run.close()
    with pytest.raises(Misuse, match="closed"):
        run.open(8)


def test_outputs_outlive_the_call(uneven: Checkpoint) -> None:
    run = NativeRun(stage(uneven, dtype="float32"))
    segments = [Segment(run.stage.open(TOKENS), 0, 1)]
    given = rows_of(Part("a", 0, 1), uneven.hidden_size).numpy().tobytes()
    first = run.stage.run(segments, given)
    kept = bytes(first)
    run.stage.run(segments, given[::-1])
    run.stage.close()
    assert bytes(first) == kept


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


BIG = UNEVEN | {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 4, "num_attention_heads": 10}


def test_memory_is_freed_and_the_file_is_not_held(tmp_path: Path) -> None:
    """Of a model of 120 MB in float32."""
    checkpoint = read_checkpoint(make_model(tmp_path, "llama", BIG))
    packed = sum(checkpoint.bytes_per_block())
    stage(checkpoint, dtype="float32").close()
    before = resident()
    for _ in range(3):
        loaded = stage(checkpoint, dtype="float32", threads=2)
        assert 0.9 * packed < resident() - before < 1.5 * packed
        loaded.close()
        assert resident() - before < 0.2 * packed
    for _ in range(3):
        stage(checkpoint, dtype="float32")  # nobody closes it
        assert resident() - before < 0.2 * packed


def test_a_stage_that_fails_to_load_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(make_model(tmp_path, "llama", BIG))
    stage(checkpoint, dtype="float32").close()
    last = checkpoint.tensors["model.layers.3.mlp.down_proj.weight"]
    with last.file.open("r+b") as file:
        file.seek(last.offset + last.nbytes - 4)
        file.write(b"\x00\x00\xc0\x7f")
    before = resident()
    for _ in range(2):
        with pytest.raises(CorruptModel, match="not finite"):
            stage(checkpoint, dtype="float32")
        assert resident() - before < 0.2 * sum(checkpoint.bytes_per_block())


def test_the_library_says_which_kernels_there_are() -> None:
    assert library().kernels
    assert library().kernels[-1] == "portable"
