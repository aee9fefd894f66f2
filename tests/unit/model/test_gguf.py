"""GGUF headers: read without the weights, and never believed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from bsns.core.errors import CorruptModel, ModelNotFound, UnsupportedModel
from bsns.model.gguf import check_gguf


def write_gguf(file: Path, **numbers: int) -> Path:
    writer = GGUFWriter(file, "llama")
    for key, value in numbers.items():
        writer.add_uint32(key.replace("_", "."), value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(5000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 5000)
    writer.add_array("short", ["a", "b"])
    writer.add_tensor("one", np.ones((4, 32), np.float32))
    writer.add_tensor("two", np.ones((3, 5), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_metadata_without_the_vocabulary(tmp_path: Path) -> None:
    metadata = check_gguf(write_gguf(tmp_path / "a.gguf", llama_block=3))
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block"] == 3
    assert metadata["short"] == ["a", "b"]
    assert metadata["tokenizer.ggml.tokens"] is None


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf")
    whole = file.read_bytes()
    needed = len(whole.rstrip(b"\0"))
    for length in [*range(0, 400), *range(400, needed, 4999), needed - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptModel, match=r"a\.gguf"):
            check_gguf(file)


@pytest.mark.parametrize(
    "start",
    [
        b"GGML" + bytes(20),
        b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63),
        b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"k", 99, 0),
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 2**40),
        b"GGUF" + struct.pack("<IQQQ1sII", 3, 1, 0, 1, b"t", 2**31, 0),
    ],
)
def test_nonsense(tmp_path: Path, start: Any) -> None:
    (tmp_path / "a.gguf").write_bytes(start + bytes(64))
    with pytest.raises(CorruptModel, match=r"a\.gguf"):
        check_gguf(tmp_path / "a.gguf")


def test_nested_arrays_do_not_exhaust_the_stack(tmp_path: Path) -> None:
    deep = struct.pack("<IQ", 9, 1) * 5000
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + deep)
    with pytest.raises(CorruptModel):
        check_gguf(tmp_path / "a.gguf")


def test_absent_and_split(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        check_gguf(tmp_path / "none.gguf")
    with pytest.raises(UnsupportedModel, match="merge"):
        check_gguf(write_gguf(tmp_path / "a.gguf", split_count=2))
