"""Llama models as GGUF files to measure llama.cpp with: of any shape, or with a checkpoint's own weights.

The files hold no tokenizer, which llama.cpp accepts under the name `no_vocab`. Matrices are all in one format, norms in
float32. They are written tensor by tensor: the largest one in float32 is all that is in memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import BadOption, CorruptModel, DiskFull, UnsupportedModel
from bsns.model.checkpoint import Checkpoint, TensorEntry
from bsns.model.failures import is_no_disk

FORMATS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
"""What the matrices may be kept in. q8_0 and q4_0 are groups of 32 weights with one float16 scale (ggml's own)."""
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# Part of a file's name: raise it when what is written changes.
_WRITING = 1
# Llama's own initialiser range: activations stay of ordinary size, far from the slow denormals.
_SPREAD = 0.02

_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Matrix = NDArray[np.float32]
_Read = Callable[[str, tuple[int, ...]], Matrix]


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama model; `tied` where the head is the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context_tokens: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False


def made_up_gguf(shape: LlamaShape, form: str, folder: Path, *, seed: int = 1) -> Path:
    """A GGUF file of that shape with random weights, kept in `folder`; the same in every format, but for rounding.

    Made the first time, some ten seconds for each thousand million weights. Raises BadOption or DiskFull.
    """
    name = f"llama-{shape.layers}x{shape.hidden}"
    return _kept(shape, form, folder, name, f"seed {seed}", lambda tensor, size: _drawn(tensor, size, seed))


def checkpoint_gguf(checkpoint: Checkpoint, form: str, folder: Path) -> Path:
    """A GGUF file of a Llama checkpoint's weights, kept in `folder`.

    Raises UnsupportedModel for what is no plain Llama, CorruptModel, BadOption or DiskFull.
    """
    shape = shape_of_llama(checkpoint)
    return _kept(
        shape,
        form,
        folder,
        checkpoint.path.name,
        checkpoint.model_id,
        lambda tensor, size: _stored(checkpoint, shape, tensor, size),
    )


def shape_of_llama(checkpoint: Checkpoint) -> LlamaShape:
    """The shape of a Llama checkpoint. Raises UnsupportedModel where llama.cpp would compute another model."""
    config = checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") != "llama" or scaled or biased or config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(
            f"{checkpoint.path.name} is no plain Llama (or has scaled positions or biases); "
            "compare with llama.cpp on one that is, such as smollm2-135m"
        )
    heads = int(config["num_attention_heads"])
    return LlamaShape(
        layers=checkpoint.block_count,
        hidden=checkpoint.hidden_size,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or checkpoint.hidden_size // heads),
        intermediate=int(config["intermediate_size"]),
        vocabulary=checkpoint.vocab_size,
        context_tokens=checkpoint.context_tokens,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in checkpoint.tensors,
    )


def tensors_of(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the file in order: name, and shape as numpy has it (outputs, inputs)."""
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    hidden, wide = shape.hidden, shape.intermediate
    sizes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    yield "token_embd.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        for name, size in sizes.items():
            yield f"blk.{layer}.{name}.weight", size
    yield "output_norm.weight", (hidden,)
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, hidden)


def _kept(shape: LlamaShape, form: str, folder: Path, name: str, identity: str, read: _Read) -> Path:
    if form not in FORMATS:
        raise BadOption(f"there is no GGUF format {form!r}; use {', '.join(FORMATS)}")
    group, _ = gguf.GGML_QUANT_SIZES[FORMATS[form]]
    if any(size[-1] % group for _, size in tensors_of(shape) if len(size) > 1):
        raise BadOption(f"{form} needs rows of a multiple of {group} weights; use bfloat16 or another shape")
    key = hashlib.blake2b(repr((_WRITING, shape, identity)).encode(), digest_size=6).hexdigest()
    target = folder / f"{name}-{key}.{form}.gguf"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number, partial = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".partial", dir=folder)
        os.close(number)
        try:
            _write(shape, form, Path(partial), read)
            Path(partial).chmod(0o644)  # made for the owner alone; a cache may be shared
            Path(partial).rename(target)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        if is_no_disk(error):
            raise DiskFull(f"{folder} has no room for {target.name}; free some of it, or set BSNS_CACHE") from error
        raise BadOption(f"{folder} cannot be written ({error.strerror}); set BSNS_CACHE") from error
    return target


def _write(shape: LlamaShape, form: str, file: Path, read: _Read) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_file_type(_FILE_TYPES[form])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for name, size in tensors_of(shape):
        kind = FORMATS[form] if len(size) > 1 else gguf.GGMLQuantizationType.F32
        group, group_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(size)) // group * group_bytes
        writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, size in tensors_of(shape):
            matrix = read(name, size)
            writer.write_tensor_data(gguf.quants.quantize(matrix, FORMATS[form]) if len(size) > 1 else matrix)
    finally:
        writer.close()


def _drawn(name: str, size: tuple[int, ...], seed: int) -> Matrix:
    """Norms are ones; matrices are drawn from a seed of their own, so that they do not depend on the order."""
    if len(size) == 1:
        return np.ones(size, np.float32)
    own = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng([seed, own]).standard_normal(size, np.float32) * np.float32(_SPREAD)


def _stored(checkpoint: Checkpoint, shape: LlamaShape, name: str, size: tuple[int, ...]) -> Matrix:
    entry = checkpoint.tensors.get(_checkpoint_name(name))
    if entry is None or entry.shape != size:
        raise CorruptModel(f"{checkpoint.path} lacks {_checkpoint_name(name)} of shape {list(size)}; fetch it again")
    matrix = _read_entry(entry)
    if ".attn_q." in name:
        return _interleaved(matrix, shape.heads)
    if ".attn_k." in name:
        return _interleaved(matrix, shape.kv_heads)
    return matrix


def _checkpoint_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_BLOCK[part]}.weight"


def _read_entry(entry: TensorEntry) -> Matrix:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        raw = np.frombuffer(file.read(entry.nbytes), np.uint8)
    match entry.dtype:
        case "BF16":  # the upper half of a float32
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
        case "F16":
            return raw.view("<f2").astype(np.float32).reshape(entry.shape)
        case "F32":
            return raw.view("<f4").reshape(entry.shape)
    raise UnsupportedModel(f"{entry.file} holds {entry.dtype}; use weights in bfloat16, float16 or float32")


def _interleaved(matrix: Matrix, heads: int) -> Matrix:
    """Rows of each head in llama.cpp's order. It rotates neighbours (RoFormer, arXiv 2104.09864); safetensors Llamas
    are ordered for rotating halves."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(matrix.shape))
