"""What a row of data does not cover is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES as TINY
from tiny_models import make_model
from transformers import AutoModel

from bsns.core.blocks import BlockRange
from bsns.model.checkpoint import Checkpoint, TensorEntry, read_checkpoint
from bsns.model.configuration import read_config
from bsns.native.architecture import Architecture, NotNative, describe
from bsns.native.families import FAMILIES

TinyModel = Callable[[str], Path]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}


def padded(head_size: int) -> int:
    return -(-head_size // 32) * 32


def described(
    path: Path, change: Callable[[Checkpoint], Checkpoint] = lambda same: same, **config: Any
) -> Architecture:
    """A model described, its configuration and its tensors changed before."""
    read = read_config(path)
    for key, value in config.items():
        setattr(read, key, value)
    return describe(change(read_checkpoint(path)), read, BlockRange(1, 3), padded)


@pytest.mark.parametrize("family", [family for family, (kind, _) in TINY.items() if kind in FAMILIES])
def test_every_row_describes_its_family(family: str, tiny_model: TinyModel) -> None:
    found = described(tiny_model(family))
    assert len(found.blocks) == 2
    assert found.hidden == 32


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
def test_frequencies_are_those_of_the_library(rope: dict[str, Any], tmp_path: Path) -> None:
    options = TINY["llama"][1] | {"rope_parameters": rope}
    path = make_model(tmp_path, "llama", options)
    with torch.device("cpu"):
        rotary = AutoModel.from_pretrained(path).rotary_emb
    found = described(path).rotaries
    assert [one.inverse_frequencies for one in found] == [tuple(rotary.inv_freq.tolist())]
    assert found[0].scale == pytest.approx(rotary.attention_scaling)


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=lambda rope: rope["rope_type"])
def test_frequencies_that_follow_the_length_are_refused(rope: dict[str, Any], tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", TINY["llama"][1] | {"rope_parameters": rope})
    with pytest.raises(NotNative, match=f"^rope type {rope['rope_type']}$"):
        described(path)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("llama", {"hidden_act": "quick_gelu"}, "activation quick_gelu"),
        ("llama", {"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved True"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt_neox", {"is_decoder": True}, "is_decoder True"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 5}, "layers of chunked_attention"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ("llama", {"attention_bias": True}, "no tensor self_attn.q_proj.bias"),
        ("llama", {"num_key_value_heads": 4}, r"tensor self_attn.k_proj.weight of shape 16×32"),
        ("mixtral", {"num_local_experts": 3}, "tensor block_sparse_moe.gate.weight of shape 4×32"),
    ],
)
def test_keys_that_no_row_knows(family: str, config: dict[str, Any], reason: str, tiny_model: TinyModel) -> None:
    with pytest.raises(NotNative, match=f"^{reason}$"):
        described(tiny_model(family), **config)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_dropout": 0.1, "pretraining_tp": 2, "rope_interleaved": False, "is_llama_config": True}),
        ("gpt2", {"reorder_and_upcast_attn": True, "resid_pdrop": 0.3, "n_ctx": 7}),
        ("gpt_neox", {"use_parallel_residual": False, "hidden_dropout": 0.2}),
        ("qwen3_moe", {"norm_topk_prob": True}),
    ],
)
def test_keys_that_are_handled_or_harmless(family: str, config: dict[str, Any], tiny_model: TinyModel) -> None:
    described(tiny_model(family), **config)


def changed(change: Callable[[dict[str, TensorEntry]], None]) -> Callable[[Checkpoint], Checkpoint]:
    def apply(checkpoint: Checkpoint) -> Checkpoint:
        tensors = dict(checkpoint.tensors)
        change(tensors)
        return replace(checkpoint, tensors=tensors)

    return apply


GATE = "model.layers.2.mlp.gate_proj.weight"


def add(name: str) -> Callable[[dict[str, TensorEntry]], None]:
    return lambda tensors: tensors.update({name: replace(tensors[GATE], name=name)})


def retype(dtype: str) -> Callable[[dict[str, TensorEntry]], None]:
    return lambda tensors: tensors.update({GATE: replace(tensors[GATE], dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add("model.layers.2.mlp.extra.weight"), "unknown tensor mlp.extra.weight"),
        (add("model.layers.2.self_attn.q_proj.bias"), "unknown tensor self_attn.q_proj.bias"),
        (add("other.layers.2.mlp.gate_proj.weight"), "two tensors mlp.gate_proj.weight in a block"),
        (lambda tensors: tensors.pop(GATE), "no tensor mlp.gate_proj.weight"),
        (retype("F8_E4M3"), "weights in F8_E4M3"),
        (retype("I8"), "weights in I8"),
        (retype("F64"), "weights in F64"),
        (
            lambda tensors: tensors.update({GATE: replace(tensors[GATE], shape=(47, 32))}),
            "an MLP whose parts do not fit each other",
        ),
    ],
)
def test_tensors_that_no_row_knows(
    change: Callable[[dict[str, TensorEntry]], None], reason: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(NotNative, match=f"^{reason}$"):
        described(tiny_model("llama"), changed(change))


def test_tensors_of_other_blocks_do_not_matter(tiny_model: TinyModel) -> None:
    def damage(tensors: dict[str, TensorEntry]) -> None:
        del tensors["model.layers.3.mlp.up_proj.weight"]
        add("model.layers.0.mlp.extra.weight")(tensors)

    assert len(described(tiny_model("llama"), changed(damage)).blocks) == 2


def test_buffers_of_old_checkpoints_are_passed_over(tiny_model: TinyModel) -> None:
    described(tiny_model("llama"), changed(add("model.layers.2.self_attn.rotary_emb.inv_freq")))


def windows(found: Architecture) -> list[int]:
    return [block.window for block in found.blocks]


def test_windows(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert windows(described(tiny_model("mistral"))) == [7, 7]
    assert windows(described(tiny_model("llama"))) == [0, 0]
    mixed: Mapping[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    }
    assert windows(described(make_model(tmp_path, "qwen2", TINY["qwen2"][1] | mixed))) == [0, 9]
    gemma = describe(read_checkpoint(tiny_model("gemma3")), read_config(tiny_model("gemma3")), BlockRange(4, 7), padded)
    assert windows(gemma) == [6, 0, 6]
    assert len({block.rotary for block in gemma.blocks}) == 2
