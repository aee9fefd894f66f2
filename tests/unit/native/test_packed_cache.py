"""Packed blocks on disk: read instead of packing; whatever is wrong with them, nobody fails."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_stages import NativeRun, Part, library, needs_native

from bsns.core.blocks import BlockRange
from bsns.model.checkpoint import Checkpoint, read_checkpoint
from bsns.native import packed_cache
from bsns.native.packed_cache import PackedCache
from bsns.native.stage import NativeStage

pytestmark = needs_native
WHOLE = BlockRange(0, 3)


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Checkpoint:
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((tiny_model("llama") / name).read_bytes())
    return read_checkpoint(copy)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def load(checkpoint: Checkpoint, root: Path, kind: str = "int8") -> tuple[torch.Tensor, int, int]:
    """What a stage computes, and how many of its blocks were read and written."""
    kept = PackedCache(checkpoint, library(), kind, root)
    stage = NativeStage(checkpoint, WHOLE, weights=kind, kept=kept, threads=2)
    return NativeRun(stage).batch([Part("a", 0, 9)])[0], kept.read_blocks, kept.written_blocks


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*"))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_next_start_reads(kind: str, checkpoint: Checkpoint, root: Path) -> None:
    first, *counts = load(checkpoint, root, kind)
    assert counts == [0, 3]
    assert [file.name for file in files(root)] == ["0.packed", "1.packed", "2.packed"]
    second, *counts = load(checkpoint, root, kind)
    assert counts == [3, 0]
    assert torch.equal(first, second)


def test_what_nobody_has_used_for_a_month_is_removed_when_something_else_is_kept(
    checkpoint: Checkpoint, root: Path
) -> None:
    def age() -> None:
        long_ago_s = time.time() - packed_cache.UNUSED_S - 60
        for kept in root.iterdir():
            os.utime(kept, (long_ago_s, long_ago_s))

    load(checkpoint, root, "int8")
    (unused,) = root.iterdir()
    age()
    load(checkpoint, root, "int4")
    (used,) = root.iterdir()
    assert used != unused
    age()
    assert load(checkpoint, root, "int4")[1:] == (3, 0)
    load(checkpoint, root, "int8")
    assert set(root.iterdir()) == {used, unused}


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def cut_short(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)


def foreign(file: Path) -> None:
    file.write_bytes((file.parent / "0.packed").read_bytes())


def nonsense(file: Path) -> None:
    file.write_bytes(b"\x10" + bytes(7) + b'{"sums": "none"}' + bytes(9000))


def no_object(file: Path) -> None:
    file.write_bytes(b"\x02" + bytes(7) + b"[]" + bytes(9000))


def no_json(file: Path) -> None:
    file.write_bytes(b"\x02" + bytes(7) + b"\xff{" + bytes(9000))


def huge_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 9000)


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def no_sums(file: Path) -> None:
    file.write_bytes(b"\x0e" + bytes(7) + b'{"sums": null}' + bytes(9000))


def nested(file: Path) -> None:
    file.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


DAMAGES = [cut, cut_short, empty, flip, nonsense, no_object, no_json, no_sums, nested, huge_header, a_directory]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_written_anew(damage: Callable[[Path], None], checkpoint: Checkpoint, root: Path) -> None:
    expected = load(checkpoint, root)[0]
    damage(next(root.glob("*/1.packed")))
    actual, *counts = load(checkpoint, root)
    assert torch.equal(actual, expected)
    if damage is not a_directory:
        assert counts == [2, 1]
        assert load(checkpoint, root)[1:] == (3, 0)


def test_another_blocks_file_is_not_taken(checkpoint: Checkpoint, root: Path) -> None:
    """Blocks of one model are of the same shape: only their tensors' names tell them apart."""
    expected = load(checkpoint, root)[0]
    foreign(next(root.glob("*/1.packed")))
    actual, *counts = load(checkpoint, root)
    assert torch.equal(actual, expected)
    assert counts == [2, 1]


def test_a_model_that_was_changed_is_another(checkpoint: Checkpoint, root: Path) -> None:
    load(checkpoint, root)
    os.utime(checkpoint.path / "model.safetensors", ns=(1, 1))
    assert load(checkpoint, root)[1:] == (0, 3)


def test_another_packing_is_another(checkpoint: Checkpoint, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(checkpoint, root)
    monkeypatch.setattr(library(), "packing", 99)
    assert load(checkpoint, root)[1:] == (0, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_no_failure(
    number: int, checkpoint: Checkpoint, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    expected = load(checkpoint, root)[0]
    for file in files(root):
        file.unlink()
    monkeypatch.setattr(packed_cache.Path, "replace", full)
    actual, *counts = load(checkpoint, root)
    assert torch.equal(actual, expected)
    assert counts == [0, 0]
    assert files(root) == []


def test_a_place_that_cannot_be_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "packed").write_text("a file")
    assert load(checkpoint, tmp_path / "packed")[1:] == (0, 0)


def test_only_what_is_slow_to_pack_is_kept(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSNS_CACHE", str(tmp_path / "cache"))
    for weights, kept in (("same", False), ("int8", True), ("int4", True)):
        assert (NativeStage(checkpoint, WHOLE, weights=weights).kept is not None) is kept
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 2
