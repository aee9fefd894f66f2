"""Checkpoints: what the headers say, and every way in which they can lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bsns.core.errors import CorruptModel, ModelNotFound, UnsupportedModel
from bsns.model.checkpoint import TensorEntry, read_checkpoint, read_header

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.1.mlp.weight": (8, 16),
    "model.norm.weight": (8,),
}


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], fill: int = 0) -> None:
    """A float32 safetensors file, written by hand so that tests can also write wrong ones."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    write_raw(file, header, bytes([fill]) * at)


def write_raw(file: Path, header: Any, data: bytes) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_model(path: Path, shards: int = 1, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    if shards == 1:
        write_safetensors(path / "model.safetensors", SHAPES)
        return path
    places = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(SHAPES.items())[n::shards])
        write_safetensors(path / file, part)
        places |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def test_sizes(tmp_path: Path) -> None:
    found = read_checkpoint(write_model(tmp_path))
    assert (found.block_count, found.hidden_size, found.vocab_size, found.context_tokens) == (2, 8, 10, 128)
    assert found.bytes_per_block() == (256, 512)
    assert found.end_bytes() == 4 * (80 + 8)
    assert found.weight_bytes == 256 + 512 + 352
    assert found.kv_bytes_per_token_per_block(2) == 2 * 2 * 2 * 2


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    one, two = read_checkpoint(write_model(tmp_path / "one")), read_checkpoint(write_model(tmp_path / "two", shards=2))
    assert one.model_id == two.model_id
    assert one.bytes_per_block() == two.bytes_per_block()
    (tmp_path / "two" / "model.safetensors.index.json").unlink()
    assert read_checkpoint(tmp_path / "two").model_id == one.model_id


def test_id_ignores_how_it_was_saved_and_sees_what_it_computes(tmp_path: Path) -> None:
    plain = read_checkpoint(write_model(tmp_path / "a")).model_id
    assert read_checkpoint(write_model(tmp_path / "b", transformers_version="9", _name_or_path="x")).model_id == plain
    assert read_checkpoint(write_model(tmp_path / "c", rope_theta=5.0)).model_id != plain
    tuned = write_model(tmp_path / "d")
    write_safetensors(tuned / "model.safetensors", SHAPES, fill=1)
    assert read_checkpoint(tuned).model_id != plain


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("h.3.ln_1.bias", 3),
        ("gpt_neox.layers.7.mlp.bias", 7),
        ("transformer.blocks.1.norm.weight", 1),
        ("model.layers.5.block_sparse_moe.experts.6.w1.weight", 5),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layernorm.weight", None),
    ],
)
def test_block_of_a_tensor(name: str, block: int | None) -> None:
    assert TensorEntry(name, Path(), "F32", (), 0, 4).block == block


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32}}, 32),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16}, 16),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 8}}}, 8),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 32}}, 128),
        ({"rope_scaling": None}, 128),
    ],
)
def test_context_stops_where_rope_factors_change(tmp_path: Path, config: dict[str, Any], tokens: int) -> None:
    assert read_checkpoint(write_model(tmp_path, **config)).context_tokens == tokens


@pytest.mark.parametrize(
    ("config", "kv_bytes"),
    [
        ({"head_dim": 16}, 2 * 2 * 16),
        ({"num_key_value_heads": None}, 2 * 4 * 2),
        ({"multi_query": True}, 2 * 1 * 2),
        ({"kv_lora_rank": 4, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 5}, 4 * 13),
    ],
)
def test_kv_bytes(tmp_path: Path, config: dict[str, Any], kv_bytes: int) -> None:
    assert read_checkpoint(write_model(tmp_path, **config)).kv_bytes_per_token_per_block(1) == kv_bytes


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        read_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff", '{"architectures": ["LlamaForCausalLM"]}'])
def test_bad_config(tmp_path: Path, text: str | None) -> None:
    file = write_model(tmp_path) / "config.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptModel, match=r"config\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"architectures": None},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_unsupported(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        read_checkpoint(write_model(tmp_path, **config))


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    whole = (write_model(tmp_path) / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptModel, match=r"model\.safetensors"):
            read_checkpoint(tmp_path)
    file.write_bytes(whole + b"x")
    with pytest.raises(CorruptModel):
        read_checkpoint(tmp_path)


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff\xff",
        {"a": 3},
        {"a": TENSOR | {"dtype": "F33"}},
        {"a": TENSOR | {"shape": [3]}},
        {"a": TENSOR | {"shape": [-1, -2]}},
        {"a": TENSOR | {"shape": "no"}},
        {"a": TENSOR | {"shape": ["2"]}},
        {"a": TENSOR | {"data_offsets": [0]}},
        {"a": TENSOR | {"data_offsets": [8, 16]}},
        {"a": TENSOR | {"data_offsets": [-8, 0]}},
        {"a": TENSOR, "b": TENSOR},
        {"a": {"dtype": "F32", "shape": [2]}},
    ],
)
def test_bad_header(tmp_path: Path, header: Any) -> None:
    write_raw(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(CorruptModel, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


def test_missing_shard_missing_tensor_and_bad_index(tmp_path: Path) -> None:
    path = write_model(tmp_path, shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    write_safetensors(shard, {"other": (1,)})
    with pytest.raises(CorruptModel, match="00002"):
        read_checkpoint(path)
    shard.unlink()
    with pytest.raises(CorruptModel, match="00002"):
        read_checkpoint(path)
    for index in (
        "{",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        (path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CorruptModel, match="index"):
            read_checkpoint(path)


def test_missing_block_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match="block 2"):
        read_checkpoint(write_model(tmp_path, num_hidden_layers=3))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CorruptModel, match="safetensors"):
        read_checkpoint(tmp_path)


def test_same_tensor_in_two_files(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    (path / "model.safetensors").rename(path / "a.safetensors")
    write_safetensors(path / "b.safetensors", {"model.norm.weight": (8,)})
    with pytest.raises(CorruptModel, match=r"b\.safetensors"):
        read_checkpoint(path)


def test_needs_no_torch() -> None:
    code = "import sys, bsns.model.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
