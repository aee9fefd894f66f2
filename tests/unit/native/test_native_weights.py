"""Packing: every weight is where the kernels look for it, and a damaged file is told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_stages import NativeRun, Part, library, needs_native
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model

from bsns.core.blocks import BlockRange
from bsns.core.errors import CorruptModel, NotEnoughMemory
from bsns.model.checkpoint import read_checkpoint
from bsns.model.configuration import read_config
from bsns.native.architecture import BlockPlan, MatrixPlan, describe
from bsns.native.library import VECTORS
from bsns.native.stage import NativeStage
from bsns.native.weights import Layout, MappedFiles, _matrix, layout_of, pack_block

pytestmark = needs_native
TinyModel = Callable[[str], Path]
WHOLE = BlockRange(0, 2)


def packed(path: Path, kind: str, index: int = 0) -> tuple[BlockPlan, dict[int, np.ndarray]]:
    """A block's parts as the kernels see them, by the part's place in the layout."""
    plan = describe(read_checkpoint(path), read_config(path), WHOLE, library().padded_head).blocks[index]
    layout = layout_of(library(), plan, kind)
    memory = library().memory(layout.nbytes)
    with ThreadPoolExecutor(2) as threads, MappedFiles(library()) as files:
        pack_block(library(), layout, memory, files, threads)
    found = {}
    for number, slot in enumerate(layout.slots):
        if isinstance(slot.part, MatrixPlan):
            numbers = np.frombuffer(library().unpack(_matrix(slot, memory.address)), np.float32)
            found[number] = numbers.reshape(slot.part.rows, slot.part.columns)
        else:
            raw = bytes(memory.view[slot.offset : slot.offset + slot.part.numbers * 4])
            found[number] = np.frombuffer(raw, np.float32)
    return plan, found


def test_gate_and_up_lie_by_turns(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    weights = load_file(path / "model.safetensors")
    plan, found = packed(path, "float32")
    up = torch.from_numpy(found[2].copy()).view(-1, 2, 16, 32)
    assert torch.equal(up[:, 0].reshape(48, 32), weights["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(up[:, 1].reshape(48, 32), weights["model.layers.0.mlp.up_proj.weight"])
    assert list(plan.vectors) == ["attention_norm", "mlp_norm"]
    assert set(plan.vectors) <= set(VECTORS)


def test_heads_are_padded(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    weights = load_file(path / "model.safetensors")
    _, found = packed(path, "float32")
    qkv = torch.from_numpy(found[0].copy()).view(8, -1, 32)
    assert not qkv[:, 8:].any()
    whole = torch.cat([weights[f"model.layers.0.self_attn.{kind}_proj.weight"] for kind in "qkv"])
    assert torch.equal(qkv[:, :8].reshape(64, 32), whole)
    out = torch.from_numpy(found[1].copy()).view(32, 4, -1)
    assert not out[:, :, 8:].any()
    assert torch.equal(out[:, :, :8].reshape(32, 32), weights["model.layers.0.self_attn.o_proj.weight"])


def test_transposed_weights_and_biases(tiny_model: TinyModel) -> None:
    path = tiny_model("gpt2")
    weights = load_file(path / "model.safetensors")
    plan, found = packed(path, "float32")
    assert torch.equal(torch.from_numpy(found[2].copy()), weights["transformer.h.0.mlp.c_fc.weight"].T)
    biases = found[4 + list(plan.vectors).index("qkv_bias")][: plan.qkv.rows].reshape(12, -1)
    assert np.array_equal(biases[:, :8].ravel(), weights["transformer.h.0.attn.c_attn.bias"].numpy())
    assert not biases[:, 8:].any()


def test_norms_that_add_one(tiny_model: TinyModel) -> None:
    path = tiny_model("gemma3")
    weights = load_file(path / "model.safetensors")
    plan, found = packed(path, "float32")
    norm = found[4 + list(plan.vectors).index("after_mlp_norm")]
    assert len(norm) == 64
    assert np.array_equal(norm[:32], weights["model.layers.0.post_feedforward_layernorm.weight"].numpy() + 1)
    assert not norm[32:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, found = packed(tmp_path, "float32")
    assert np.array_equal(found[3], weights["model.layers.0.mlp.down_proj.weight"].float().numpy())
    assert np.array_equal(found[4][:32], weights["model.layers.0.input_layernorm.weight"].float().numpy())


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.004), ("int8", 0.012), ("int4", 0.13)])
def test_fewer_bits_cost_little(kind: str, most: float, tiny_model: TinyModel) -> None:
    for exact, rounded in zip(
        packed(tiny_model("llama"), "float32")[1].values(), packed(tiny_model("llama"), kind)[1].values(), strict=True
    ):
        assert np.linalg.norm(exact - rounded) <= most * np.linalg.norm(exact)


def test_a_router_stays_exact(tiny_model: TinyModel) -> None:
    path = tiny_model("mixtral")
    plan, found = packed(path, "int4")
    assert plan.router is not None
    weights = load_file(path / "model.safetensors")
    assert np.array_equal(found[2 + 4 + 4], weights["model.layers.0.block_sparse_moe.gate.weight"].numpy())


def copy_of(source: Path, target: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(
    "name", ["self_attn.k_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"]
)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(
    number: float, name: str, kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = copy_of(tiny_model("llama"), tmp_path)
    weights = load_file(path / "model.safetensors")
    weights[f"model.layers.1.{name}"].view(-1)[-1] = number
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptModel, match=f"layers.1.{name} holds numbers that are not finite") as caught:
        NativeStage(read_checkpoint(path), WHOLE, weights="same" if kind in ("float32", "bfloat16") else kind)
    assert "\n" not in caught.value.message
    NativeStage(read_checkpoint(path), BlockRange(2, 4)).close()


def test_a_file_that_was_cut_since(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copy_of(tiny_model("llama"), tmp_path)
    checkpoint = read_checkpoint(path)
    whole = (path / "model.safetensors").read_bytes()
    for size in (len(whole) // 4, 0):
        (path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CorruptModel, match="fetch it again"):
            NativeStage(checkpoint, WHOLE)
    (path / "model.safetensors").unlink()
    with pytest.raises(CorruptModel, match="fetch it again"):
        NativeStage(checkpoint, WHOLE)


def test_the_file_stays_mapped_until_every_thread_is_done(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread finds what is wrong while another still packs."""
    packing, unmapped = threading.Event(), threading.Event()
    calls, numbers = list[bool](), itertools.count()

    def pack(*_: object) -> None:
        calls.append(True)
        if next(numbers) == 0:
            assert packing.wait(10)
            raise CorruptModel("not finite")
        packing.set()
        calls.append(unmapped.wait(0.2))

    def leave(*_: object) -> None:
        unmapped.set()

    monkeypatch.setattr("bsns.native.weights._JOB_BYTES", 1)
    monkeypatch.setattr("bsns.native.library.Library.pack", pack)
    monkeypatch.setattr("bsns.native.weights.MappedFiles.__exit__", leave)
    with pytest.raises(CorruptModel):
        NativeStage(read_checkpoint(tiny_model("gpt2")), WHOLE, threads=2)
    assert unmapped.is_set()
    assert calls.count(False) >= 1
    assert len(calls) == 1 + 2 * calls.count(False), "unmapped under a thread that packed"


def test_no_memory(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*arguments: object) -> Layout:
        return replace(layout_of(*arguments), nbytes=1 << 60)  # type: ignore[arg-type]

    monkeypatch.setattr("bsns.native.stage.layout_of", huge)
    with pytest.raises(NotEnoughMemory, match="fewer blocks"):
        NativeStage(read_checkpoint(tiny_model("llama")), WHOLE)


def test_many_threads_pack_what_one_does(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_model(tmp_path, "llama", FAMILIES["llama"][1] | {"intermediate_size": 208})
    checkpoint = read_checkpoint(path)
    outputs = []
    for threads, job_bytes in ((1, 1 << 30), (3, 1)):
        monkeypatch.setattr("bsns.native.weights._JOB_BYTES", job_bytes)
        for weights in ("same", "int8", "int4"):
            run = NativeRun(NativeStage(checkpoint, WHOLE, weights=weights, threads=threads, kept=False))
            outputs.append(run.batch([Part("a", 0, 20)])[0])
    assert all(torch.equal(one, many) for one, many in zip(outputs[:3], outputs[3:], strict=True))
