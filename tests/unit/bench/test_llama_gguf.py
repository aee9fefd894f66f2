"""GGUF files that are made to measure llama.cpp with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bsns.bench.llama_gguf import FORMATS, LlamaShape, checkpoint_gguf, made_up_gguf, shape_of_llama, tensors_of
from bsns.core.errors import BadOption, CorruptModel, UnsupportedModel
from bsns.model.checkpoint import Checkpoint, read_checkpoint
from bsns.model.gguf import check_gguf

SHAPE = LlamaShape(layers=2, hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=96, vocabulary=160)
# How far a weight may be from what it was, relative to the largest of its group of 32. Scales are float16, and q4_0
# counts from -8 to 7: what is as large as the largest, and of the other sign, is a step off.
CLOSE = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}


def weights(file: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def their_names() -> dict[str, str]:
    """The names in a checkpoint of SHAPE by those in a GGUF file."""
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    parts |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
    parts |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(SHAPE.layers):
        names |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{name}" for part, name in parts.items()}
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}


def checkpoint(path: Path, **changes: object) -> Checkpoint:
    """A checkpoint of SHAPE with random weights in float32."""
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": SHAPE.layers,
        "hidden_size": SHAPE.hidden,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads,
        "intermediate_size": SHAPE.intermediate,
        "vocab_size": SHAPE.vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    names = their_names()
    torch.manual_seed(3)
    save_file({names[name]: torch.randn(size) for name, size in tensors_of(SHAPE)}, path / "model.safetensors")
    return read_checkpoint(path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_made_up_model_says_its_shape(tmp_path: Path, form: str) -> None:
    file = made_up_gguf(SHAPE, form, tmp_path / "kept")
    said = check_gguf(file)
    assert said["general.architecture"] == "llama"
    assert said["tokenizer.ggml.model"] == "no_vocab"
    wanted = {
        "block_count": SHAPE.layers,
        "embedding_length": SHAPE.hidden,
        "feed_forward_length": SHAPE.intermediate,
        "attention.head_count": SHAPE.heads,
        "attention.head_count_kv": SHAPE.kv_heads,
        "attention.key_length": SHAPE.head_size,
        "attention.value_length": SHAPE.head_size,
        "rope.dimension_count": SHAPE.head_size,
        "vocab_size": SHAPE.vocabulary,
        "context_length": SHAPE.context_tokens,
    }
    assert {key: said[f"llama.{key}"] for key in wanted} == wanted
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {name: tuple(tensor.shape[::-1]) for name, tensor in tensors.items()} == dict(tensors_of(SHAPE))
    kinds = {"norm" in name: tensor.tensor_type for name, tensor in tensors.items()}
    assert kinds == {True: gguf.GGMLQuantizationType.F32, False: FORMATS[form]}
    assert [part.name for part in (tmp_path / "kept").iterdir()] == [file.name]


@pytest.mark.parametrize("form", FORMATS)
def test_made_up_weights_are_the_same_in_every_format(tmp_path: Path, form: str) -> None:
    exact = weights(made_up_gguf(SHAPE, "float32", tmp_path))
    for name, matrix in weights(made_up_gguf(SHAPE, form, tmp_path)).items():
        groups = np.abs(exact[name]).reshape(-1, 32).max(axis=1, keepdims=True)
        assert np.all(np.abs(matrix - exact[name]).reshape(-1, 32) <= CLOSE[form] * groups + 1e-9), name
    assert 0.01 < exact["blk.1.ffn_up.weight"].std() < 0.03
    assert not np.array_equal(exact["blk.0.attn_q.weight"], exact["blk.1.attn_q.weight"])


def test_a_file_is_made_once_and_for_one_model(tmp_path: Path) -> None:
    file = made_up_gguf(SHAPE, "q8_0", tmp_path)
    made = file.stat().st_mtime_ns
    assert made_up_gguf(SHAPE, "q8_0", tmp_path) == file
    assert file.stat().st_mtime_ns == made
    others = {made_up_gguf(SHAPE, "q8_0", tmp_path, seed=2), made_up_gguf(SHAPE, "q4_0", tmp_path)}
    assert len({file, *others}) == 3


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    tied = LlamaShape(1, 32, 2, 1, 16, 32, 64, tied=True)
    assert "output.weight" not in weights(made_up_gguf(tied, "float32", tmp_path))


def test_a_checkpoints_own_weights(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "tiny")
    assert shape_of_llama(source) == LlamaShape(
        **(asdict(SHAPE) | {"context_tokens": 512, "rope_theta": 5000.0, "norm_eps": 1e-5})
    )
    stored = load_file(tmp_path / "tiny" / "model.safetensors")
    found = weights(checkpoint_gguf(source, "float32", tmp_path))
    for ours, theirs in their_names().items():
        matrix = stored[theirs].numpy()
        if ".attn_q." in ours or ".attn_k." in ours:
            # The halves of each head of 16, row by row in turn.
            turns = [head + row for head in range(0, len(matrix), 16) for pair in range(8) for row in (pair, pair + 8)]
            matrix = matrix[turns]
        np.testing.assert_array_equal(found[ours], matrix, err_msg=ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_halves_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    source = checkpoint(tmp_path / "tiny")
    stored = {name: matrix.to(dtype) for name, matrix in load_file(tmp_path / "tiny" / "model.safetensors").items()}
    save_file(stored, tmp_path / "tiny" / "model.safetensors")
    found = weights(checkpoint_gguf(read_checkpoint(source.path), "float32", tmp_path))
    wanted = stored["model.layers.1.mlp.up_proj.weight"].float().numpy()
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "llama3", "factor": 8.0}},
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match="no plain Llama"):
        checkpoint_gguf(checkpoint(tmp_path / "tiny", **changes), "float32", tmp_path)


def test_a_checkpoint_of_another_shape_than_it_says(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match="gate_proj"):
        checkpoint_gguf(checkpoint(tmp_path / "tiny", intermediate_size=128), "float32", tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_formats_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="no GGUF format 'q5_1'"):
        made_up_gguf(SHAPE, "q5_1", tmp_path)
    with pytest.raises(BadOption, match="multiple of 32"):
        made_up_gguf(LlamaShape(1, 48, 3, 1, 16, 64, 64), "q8_0", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BadOption, match="cannot be written"):
        made_up_gguf(SHAPE, "q8_0", tmp_path / "file")
