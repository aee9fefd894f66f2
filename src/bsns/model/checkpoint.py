"""A checkpoint on disk: what config.json and the safetensors headers say, checked, without reading any weights.

Torch-free: the network half and the planner may use it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bsns.core.errors import CorruptModel, ModelNotFound, UnsupportedModel
from bsns.core.ids import ModelId

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The safetensors format's own limit on a header, in bytes.
MAX_HEADER_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_DECODERS = ("ForCausalLM", "LMHeadModel")
# Keys of config.json that say how the model was saved or is to be used, not what it computes.
_INCIDENTAL = {
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
}
# How many tensors, and how many bytes of each, the fingerprint samples: enough to tell two fine-tunes of one
# architecture apart, few enough to stay a matter of milliseconds.
_SAMPLED_TENSORS = 64
_SAMPLED_BYTES = 64


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: its file, dtype as safetensors names it, shape, and place in the file in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def block(self) -> int | None:
        """The decoder block it belongs to; None for the ends: embedding, final norm and head."""
        found = _BLOCK.search(self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked safetensors directory. `tensors` is ordered by name."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry] = field(repr=False)

    @property
    def block_count(self) -> int:
        return _whole(self.config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")

    @property
    def hidden_size(self) -> int:
        return _whole(self.config, "hidden_size", "n_embd", "d_model")

    @property
    def vocab_size(self) -> int:
        return _whole(self.config, "vocab_size")

    @property
    def context_tokens(self) -> int:
        """How many positions a session may use.

        Where the rope factors depend on the length ("longrope", "dynamic"), only the length before they change: the
        sessions of one batch must share their factors.
        """
        tokens = _whole(self.config, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
        for rope in self._ropes():
            if rope.get("rope_type", rope.get("type")) in {"longrope", "dynamic", "su"}:
                original = rope.get("original_max_position_embeddings") or self.config.get(
                    "original_max_position_embeddings"
                )
                tokens = min(tokens, int(original or tokens))
        return tokens

    @property
    def model_id(self) -> ModelId:
        """Fingerprint of configuration, tensor index and a sample of the weights; the directory does not enter.

        The sample keeps two fine-tunes of one architecture from passing for the same model.
        """
        digest = hashlib.blake2b(digest_size=20)
        config = {k: v for k, v in self.config.items() if k not in _INCIDENTAL and not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
        for entry in self.tensors.values():
            digest.update(f"\n{entry.name} {entry.dtype} {entry.shape}".encode())
        drawn = sorted(self.tensors.values(), key=lambda entry: hashlib.blake2b(entry.name.encode()).digest())
        for entry in sorted(drawn[:_SAMPLED_TENSORS], key=lambda entry: entry.name):
            with entry.file.open("rb") as file:
                file.seek(entry.offset + max(0, entry.nbytes - _SAMPLED_BYTES) // 2)
                digest.update(file.read(min(_SAMPLED_BYTES, entry.nbytes)))
        return ModelId(digest.hexdigest())

    @property
    def weight_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def bytes_per_block(self) -> tuple[int, ...]:
        """Weight bytes of each block, in order."""
        sizes = [0] * self.block_count
        for entry in self.tensors.values():
            block = entry.block
            if block is not None and block < len(sizes):
                sizes[block] += entry.nbytes
        return tuple(sizes)

    def end_bytes(self) -> int:
        """Weight bytes of the ends: embedding, final norm and head."""
        return sum(entry.nbytes for entry in self.tensors.values() if entry.block is None)

    def kv_bytes_per_token_per_block(self, dtype_bytes: int, kv: str = "none") -> int:
        """Bytes of keys and values that one token leaves in one block's cache; with `kv="int8"` a byte for each number,
        and a scale in float32 for each head."""
        number_bytes, head_bytes = (1, 2 * 4) if kv == "int8" else (dtype_bytes, 0)
        config = self.config
        heads = _whole(config, "num_attention_heads", "n_head", "n_heads")
        if config.get("kv_lora_rank"):
            # Multi-head latent attention; transformers caches the expanded keys and values.
            key = int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"])
            return heads * ((key + int(config["v_head_dim"])) * number_bytes + head_bytes)
        head_dim = int(config.get("head_dim") or self.hidden_size // heads)
        kv_heads = int(config.get("num_key_value_heads") or config.get("num_kv_heads") or heads)
        if config.get("multi_query") and not config.get("new_decoder_architecture"):
            kv_heads = 1  # Falcon 7B and GPT-BigCode
        return kv_heads * (2 * head_dim * number_bytes + head_bytes)

    def _ropes(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.config.get(key)
            if isinstance(rope, dict):
                # Gemma 3 keeps one set of parameters per kind of layer.
                found += [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]
        return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks the headers of a safetensors directory; a few milliseconds.

    Raises ModelNotFound, CorruptModel (naming the file) or UnsupportedModel.
    """
    if not path.is_dir():
        raise ModelNotFound(f"{path} is not a directory")
    config = _read_config(path)
    tensors = _read_tensors(path)
    checkpoint = Checkpoint(path, config, dict(sorted(tensors.items())))
    for name in ("block_count", "hidden_size", "vocab_size", "context_tokens"):
        getattr(checkpoint, name)
    empty = [block for block, size in enumerate(checkpoint.bytes_per_block()) if size == 0]
    if empty:
        raise CorruptModel(f"{path} has no weights for block {empty[0]} of {checkpoint.block_count}; fetch it again")
    return checkpoint


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by name. Raises CorruptModel if the file contradicts its own header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise _corrupt(file, "its header is longer than the file")
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise _corrupt(file, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _corrupt(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a table of tensors")
    start = 8 + header_bytes
    entries = [_entry(file, start, name, fields) for name, fields in header.items() if name != "__metadata__"]
    reached = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != reached:
            raise _corrupt(file, f"tensor {entry.name} does not follow the one before it")
        reached += entry.nbytes
    if reached != size:
        raise _corrupt(file, f"it should be {reached} bytes long and is {size}")
    return {entry.name: entry for entry in entries}


def _entry(file: Path, start: int, name: str, fields: Any) -> TensorEntry:
    try:
        dtype, (begin, end) = fields["dtype"], fields["data_offsets"]
        shape = tuple(fields["shape"])
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and end - begin == nbytes
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(file, f"tensor {name!r} has a bad description") from error
    if not sound:
        raise _corrupt(file, f"tensor {name!r} of {dtype} {list(shape)} cannot lie at bytes {begin} to {end}")
    return TensorEntry(name, file, dtype, shape, start + begin, nbytes)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        hint = "; pass the .gguf file itself" if any(path.glob("*.gguf")) else ""
        raise CorruptModel(f"{path} has no {CONFIG}{hint}")
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise _corrupt(file, f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _corrupt(file, "it is not JSON") from error
    if not isinstance(config, dict):
        raise _corrupt(file, "it is not a JSON object")
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not any(str(name).endswith(_DECODERS) for name in names):
        called = ", ".join(map(str, names)) or str(config.get("model_type", "of unknown architecture"))
        raise UnsupportedModel(f"{path.name} is {called}; only decoder language models (…ForCausalLM) can be served")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UnsupportedModel(f"{path.name} is quantised with {method}; use its 16-bit weights or a GGUF file")
    return config


def _read_tensors(path: Path) -> dict[str, TensorEntry]:
    # The order in which transformers looks: one file, then an index; then whatever is there.
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    if (path / INDEX).is_file():
        return _read_indexed(path, path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CorruptModel(f"{path} has a {CONFIG} but no .safetensors file; fetch the weights in safetensors format")
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        found = read_header(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise _corrupt(file, f"tensor {min(twice)} is already in {tensors[min(twice)].file.name}")
        tensors |= found
    return tensors


def _read_indexed(path: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(places.values()))
        if any(os.path.basename(shard) != shard or not shard.endswith(".safetensors") for shard in shards):
            raise ValueError("a shard outside the directory")
    except OSError as error:
        raise _corrupt(index, f"it cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(index, "it is not an index of shards") from error
    absent = [shard for shard in shards if not (path / shard).is_file()]
    if absent:
        raise CorruptModel(f"{path} lacks {absent[0]}, which {index.name} names; fetch it again")
    headers = {shard: read_header(path / shard) for shard in shards}
    tensors: dict[str, TensorEntry] = {}
    for name, shard in places.items():
        if name not in headers[shard]:
            raise _corrupt(path / shard, f"it lacks tensor {name}, which {index.name} promises")
        tensors[name] = headers[shard][name]
    return tensors


def _whole(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise CorruptModel(f"config.json gives no {names[0]}")


def _corrupt(file: Path, reason: str) -> CorruptModel:
    return CorruptModel(f"{file} is damaged: {reason}; fetch it again")
