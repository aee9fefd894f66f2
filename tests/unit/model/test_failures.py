"""What readers, libraries and the system raise, as errors that say what to do."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CorruptModel, DiskFull, ModelNotFound, NotEnoughMemory
from bsns.model import source, stage
from bsns.model.attention import KVCache, Segment
from bsns.model.ends import Ends
from bsns.model.failures import failure
from bsns.model.gguf import convert_gguf
from bsns.model.source import resolve
from bsns.model.stage import Stage

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError(), NotEnoughMemory),
        (RuntimeError(CPU), NotEnoughMemory),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), NotEnoughMemory),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), NotEnoughMemory),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), CorruptModel),
        (Exception("Error while deserializing header: incomplete metadata, file not fully covered"), CorruptModel),
        (ValueError(), CorruptModel),
    ],
)
def test_what_is_to_be_done(raised: Exception, kind: type[BsnsError]) -> None:
    error = failure(raised, Path("/models/some"))
    assert type(error) is kind
    assert "/models/some" in error.message
    assert "free some" in error.message or "fetch it again" in error.message


def test_a_truncated_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_model("llama"), tmp_path / "cut"))
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CorruptModel, match="fetch it again"):
        Stage(path, BlockRange(0, 2), dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whoever_overwrites_the_file_changes_nothing_of_what_is_loaded(
    dtype: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))
    loaded, ends = Stage(path, BlockRange(1, 3), dtype=dtype), Ends(path, dtype=dtype)
    hidden_ND = torch.randn(2, loaded.hidden_size, generator=torch.Generator().manual_seed(1)).to(loaded.dtype)
    positions_N = torch.arange(2)

    def compute() -> list[torch.Tensor]:
        embedded_ND = ends.embed(torch.tensor([3, 5]), positions_N)
        return [loaded.run(hidden_ND, [Segment(KVCache(2), 0, 0, 2)]), embedded_ND, ends.logits(embedded_ND)]

    before = compute()
    file = path / "model.safetensors"
    with file.open("r+b") as stream:  # the same file, not another in its place
        stream.write(b"\x3f" * file.stat().st_size)
    assert all(torch.equal(one, other) for one, other in zip(before, compute(), strict=True))


@pytest.mark.parametrize("where", ["_place", "_check"])
def test_no_memory_for_a_stage(where: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(CPU)

    monkeypatch.setattr(stage.Stage, where, fail)
    with pytest.raises(NotEnoughMemory, match="free some"):
        Stage(tiny_model("llama"), BlockRange(0, 2), dtype="float32")


@pytest.mark.parametrize(
    ("last", "kind"),
    [("OSError: [Errno 28] No space left on device", DiskFull), ("MemoryError", NotEnoughMemory)],
)
def test_a_converter_that_runs_out(
    last: str, kind: type[BsnsError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    converter = tmp_path / "python"
    converter.write_text(f"#!/bin/sh\necho '{last}' >&2\nexit 1\n")
    converter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(converter))
    with pytest.raises(kind, match=r"some\.gguf"):
        convert_gguf(tmp_path / "some.gguf", tmp_path / "out")


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EROFS, ModelNotFound)])
def test_a_cache_that_cannot_be_written(
    number: int, kind: type[BsnsError], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BSNS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + bytes(8))

    def fail(**_: Any) -> str:
        raise OSError(number, "it will not be")

    monkeypatch.setattr(source.tempfile, "mkdtemp", fail)
    with pytest.raises(kind, match="BSNS_CACHE"):
        resolve(str(file))


def test_a_disk_too_full_for_a_model_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DiskFull, match="org/name"):
        resolve("org/name")
