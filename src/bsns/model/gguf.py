"""GGUF files: checking one by its header, and turning it once into a safetensors directory.

The conversion runs in a process of its own (`python -m bsns.model.gguf FILE DIRECTORY`): its memory goes back when it
ends, and the two shortcuts it takes through the libraries stay inside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bsns.core.errors import CorruptModel, DiskFull, ModelNotFound, NotEnoughMemory, UnsupportedModel
from bsns.model.failures import is_no_disk, is_no_memory

Progress = Callable[[str, float | None], None]

# Sizes of the value types of GGUF metadata (ggml/docs/gguf.md); 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Arrays beyond this length are a tokenizer's, and are skipped.
_LONG = 4096


def check_gguf(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file (long arrays left out), after checking that all its tensors lie inside it.

    Raises ModelNotFound, CorruptModel or UnsupportedModel.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CorruptModel(f"{file} is damaged: it does not begin with GGUF; fetch it again")
            blob = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise ModelNotFound(f"there is no file {file}") from error
    except OSError as error:
        raise CorruptModel(f"{file} cannot be read: {error.strerror}") from error
    with contextlib.closing(blob):
        try:
            metadata, data_end = _Header(blob).read()
        except (struct.error, ValueError, KeyError, OverflowError, RecursionError) as error:
            raise CorruptModel(f"{file} is damaged: its header breaks off or makes no sense; fetch it again") from error
        if data_end > len(blob):
            raise CorruptModel(
                f"{file} is damaged: {data_end - len(blob)} bytes of its tensors are missing; fetch it again"
            )
    if int(metadata.get("split.count", 1)) > 1:
        raise UnsupportedModel(f"{file.name} is one part of a split GGUF; join the parts with llama-gguf-split --merge")
    return metadata


class _Header:
    """A walk over the header of a mapped GGUF file."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob = blob
        self.at = 4

    def read(self) -> tuple[dict[str, Any], int]:
        """Metadata, and where the last tensor ends in bytes."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        version, tensor_count, key_count = self.take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(*self.take("<I"))
        ends = [0]
        for _ in range(tensor_count):
            self.string()
            (dim_count,) = self.take("<I")
            elements = 1
            for dim in self.take(f"<{dim_count}Q"):
                elements *= dim
            kind, offset = self.take("<IQ")
            per_group, group_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            ends.append(offset + elements // per_group * group_bytes)
        alignment = int(metadata.get("general.alignment", 32))
        return metadata, -(-self.at // alignment) * alignment + max(ends)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.blob, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self) -> str:
        (length,) = self.take("<Q")
        if length > len(self.blob) - self.at:
            raise ValueError("a string beyond the end")
        self.at += length
        return self.blob[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take("<" + _SCALARS[kind])[0]
        inner, count = self.take("<IQ")
        if count > len(self.blob):
            raise ValueError("an array beyond the end")
        if inner == _STRING and count > _LONG:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", self.blob, self.at)
                self.at += 8 + length
            return None
        if inner in _SCALARS and count > _LONG:
            self.at += count * struct.calcsize("<" + _SCALARS[inner])
            return None
        return [self.value(inner) for _ in range(count)]


def convert_gguf(file: Path, directory: Path, progress: Progress | None = None) -> None:
    """Writes the model in `file`, dequantised to bfloat16, with its tokenizer into `directory`.

    Takes seconds for each 100 million weights, and the memory of the model in bfloat16 and of one tensor in float32.
    Raises NotEnoughMemory, DiskFull, or UnsupportedModel with the converter's last words.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bsns.model.gguf", str(file.absolute()), str(directory.absolute())]
    command.append(str(os.getpid()))
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | offline
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if progress is not None and line.startswith("{"):
                    step = json.loads(line)
                    progress(step["doing"], step["done"])
        except BaseException:
            child.kill()
            raise
        child.wait()
        said.seek(0)
        words = [line.strip() for line in said if line.strip()]
    last = words[-1] if words else f"status {child.returncode}"
    if child.returncode == -signal.SIGKILL or (child.returncode and is_no_memory(last)):
        raise NotEnoughMemory(
            f"converting {file.name} was stopped, most likely for want of memory; free some and try again"
        )
    if child.returncode and is_no_disk(last):
        raise DiskFull(f"{directory.parent} has no room for {file.name} converted; free some of it, or set BSNS_CACHE")
    if child.returncode:
        raise UnsupportedModel(f"{file.name} cannot be converted: {last}")


def _report(doing: str, done: float | None) -> None:
    print(json.dumps({"doing": doing, "done": done}), flush=True)


def _convert(file: Path, directory: Path) -> None:
    """The converter process: transformers' own GGUF loader, with its detours cut short."""
    _report("loading the converter", None)
    import gguf
    import torch
    import transformers.modeling_gguf_pytorch_utils as legacy
    from gguf.gguf_reader import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    class SkippingReader(GGUFReader):  # type: ignore[misc]  # gguf is untyped
        """Leaves long arrays unread. They are the tokenizer's, which transformers reads by other means; the weight
        loader, which makes one array of every string in them three times over (12 of 17 s for SmolLM2), only wants
        their length."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == _ARRAY:
                inner, count = struct.unpack_from("<IQ", self.data, orig_offs)
                if count > _LONG and (inner == _STRING or inner in _SCALARS):
                    at = orig_offs + 12
                    if inner == _STRING:
                        for _ in range(count):
                            at += 8 + struct.unpack_from("<Q", self.data, at)[0]
                    else:
                        at += count * struct.calcsize("<" + _SCALARS[inner])
                    kinds = [gguf.GGUFValueType(_ARRAY), gguf.GGUFValueType(inner)]
                    return at - orig_offs, [self.data[at:at] if inner == _STRING else (0,)], [0] * count, kinds
            return super()._get_field_parts(orig_offs, raw_type)

    def told(tensors: list[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            _report("dequantising weights", done / len(tensors))
            yield tensor

    gguf.GGUFReader = SkippingReader
    # Built anew for each of the model's modules otherwise: 397 times 10 ms.
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    legacy.tqdm = told

    torch.set_num_threads(1)
    metadata = check_gguf(file)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    _report("writing weights", None)
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    if known:
        model.generation_config.eos_token_id = known if len(known) > 1 else known[0]
    # Otherwise whoever loads it would take it for a copy of config.json and derive it anew.
    model.generation_config._from_model_config = False
    model.save_pretrained(directory, max_shard_size="2GB")
    _report("writing the tokenizer", None)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    for written in directory.iterdir():
        written.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared


if __name__ == "__main__":
    if sys.platform == "linux":  # nobody waits for the work of an orphan (prctl 2, PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[3]):
        sys.exit("whoever asked for the conversion is gone")
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
