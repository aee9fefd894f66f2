"""A client's ends on the native kernels, beside those of the model library."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from native_stages import needs_native
from test_view import HONEST

from bsns.model.ends import AGREEMENT, Ends
from bsns.model.source import resolve
from bsns.native.projection import Projection
from bsns.node.ends import head_weights, load_ends

pytestmark = needs_native
TinyModel = Callable[[str], Path]
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "olmo2")
OTHERS = ("gemma3", "gpt2", "gpt_neox")


def activations(ends: Ends, rows: int) -> torch.Tensor:
    """(rows, hidden)"""
    return torch.randn(rows, ends.hidden_size, generator=torch.Generator().manual_seed(rows)).to(ends.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*LIKE_LLAMA, *OTHERS])
def test_logits_are_the_librarys(family: str, dtype: str, tiny_model: TinyModel) -> None:
    """Whatever surrounds a family's blocks: where the native head would not agree, it is not taken."""
    source = resolve(str(tiny_model(family)))
    ours, theirs = load_ends(source, dtype=dtype), Ends(source.path, dtype=dtype)
    for rows in (1, 5, 40):
        hidden_ND = activations(ours, rows)
        actual_NV, expected_NV = ours.logits(hidden_ND), theirs.logits(hidden_ND)
        assert actual_NV.shape == expected_NV.shape
        assert actual_NV.dtype == torch.float32
        assert float((actual_NV - expected_NV).abs().max() / expected_NV.abs().max()) <= AGREEMENT[dtype]


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_a_head_in_8_bits_says_nearly_the_same(family: str, tiny_model: TinyModel) -> None:
    source = resolve(str(tiny_model(family)))
    ours, theirs = load_ends(source, dtype="bfloat16", weights="int8"), load_ends(source, dtype="bfloat16")
    hidden_ND = activations(ours, 40)
    actual_NV, expected_NV = ours.logits(hidden_ND), theirs.logits(hidden_ND)
    off = float((actual_NV - expected_NV).abs().max() / expected_NV.abs().max())
    assert 0 < off <= AGREEMENT["int8"]
    assert torch.equal(ours.logits(hidden_ND[3:4])[0], actual_NV[3]), "whatever other rows there are"


def test_the_head_is_kept_as_the_blocks_are() -> None:
    float32, int8, int4, plain = [
        msgspec.structs.replace(HONEST, dtype=dtype, quant=quant)
        for dtype, quant in (("float32", "none"), ("bfloat16", "int8"), ("bfloat16", "int4"), ("bfloat16", "none"))
    ]
    assert head_weights([float32, int8, int4], "bfloat16") == "int8"
    assert head_weights([float32, int8, int4], "float32") == "float32"
    assert head_weights([float32, int8, plain], "bfloat16") == "bfloat16"


@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_a_head_like_llamas_is_native(family: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    logits = Projection.logits

    def note(self: Projection, hidden: memoryview) -> object:
        called.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Projection, "logits", note)
    ends = load_ends(resolve(str(tiny_model(family))), dtype="bfloat16")
    called.clear()
    hidden_ND = activations(ends, 3)
    ends.logits(hidden_ND)
    assert called == [hidden_ND.nbytes]


def test_a_projection_that_computes_something_else_is_not_taken(tiny_model: TinyModel) -> None:
    source = resolve(str(tiny_model("llama")))
    projection = Projection(source.checkpoint, dtype="float32", weights="float32")
    for wrong in (
        lambda hidden: projection.logits(hidden) * 1.01,
        lambda hidden: projection.logits(hidden)[:, 1:],
        lambda hidden: projection.logits(hidden) * float("nan"),
    ):
        ends, library = Ends(source.path, dtype="float32", project=wrong), Ends(source.path, dtype="float32")
        hidden_ND = activations(ends, 2)
        assert torch.equal(ends.logits(hidden_ND), library.logits(hidden_ND))


def test_threads_take_turns(tiny_model: TinyModel) -> None:
    ends = load_ends(resolve(str(tiny_model("llama"))), dtype="float32")
    inputs = [activations(ends, rows) for rows in range(1, 9)]
    expected = [ends.logits(hidden_ND) for hidden_ND in inputs]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for actual, wanted in zip(threads.map(ends.logits, inputs), expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_lying_stage_sends_spoils_its_own_row_alone(dtype: str, tiny_model: TinyModel) -> None:
    ends = load_ends(resolve(str(tiny_model("llama"))), dtype=dtype)
    hidden_ND = activations(ends, 5)
    expected = ends.logits(hidden_ND)
    hidden_ND[2, 3] = float("nan")
    actual = ends.logits(hidden_ND)
    assert not actual[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(actual[others], expected[others])
