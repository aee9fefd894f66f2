"""Packed blocks kept on disk, one file a block, so that the next start reads instead of packing.

    u64 header length | header (JSON) | zeros up to a page | the arena's bytes

The layout is the same on every processor. A file that is cut, damaged or another's is not used and written anew; a disk
that is full or cannot be written is no failure, for everything can be packed again. What nobody has used for a month
is removed when something else is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from bsns.model.checkpoint import Checkpoint
from bsns.model.source import cache_dir
from bsns.native.architecture import BlockPlan
from bsns.native.library import ABI, Library, Memory
from bsns.native.weights import Layout

log = structlog.get_logger(__name__)

_PAGE = 4096
_PART_BYTES = 8 << 20
"""What is read and summed at a time."""
_MAX_HEADER_BYTES = 1 << 20
UNUSED_S = 30 * 86400.0


class PackedCache:
    """The packed blocks of one model in one kind."""

    def __init__(self, checkpoint: Checkpoint, library: Library, kind: str, root: Path | None = None) -> None:
        """`root`: where all models' are kept; else in the cache (see model.source)."""
        self._all = root or cache_dir() / "packed"
        self._root = self._all / _key(checkpoint, library, kind)
        with suppress(OSError):
            os.utime(self._root)  # it is used; where there is none yet, writing makes one
        self._gives_up = False
        self.read_blocks = 0
        self.written_blocks = 0

    def read(self, index: int, plan: BlockPlan, layout: Layout, memory: Memory, threads: Executor) -> bool:
        """Fill a block's arena; if that cannot be, it is all zeros as it was, and the answer is False."""
        try:
            with self._file(index).open("rb") as file:
                header = _read_header(file.fileno())
                parts = _parts(memory.nbytes)
                if header is None or header != _header(plan, layout, memory.nbytes, header.get("sums", ())):
                    return False
                if len(header["sums"]) != len(parts):
                    return False
                descriptor, start = file.fileno(), _start_of(header)

                def read(part: tuple[int, int]) -> int:
                    into = memory.view[part[0] : part[1]]
                    try:  # every part is waited for: none may write to memory that was given up
                        got = os.preadv(descriptor, [into], start + part[0])
                    except OSError:
                        return -1
                    return zlib.crc32(into) if got == len(into) else -1

                sound = list(threads.map(read, parts)) == header["sums"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, TypeError, RecursionError) as error:
            log.info("a packed block cannot be read; packing it again", block=index, reason=str(error))
            sound = False
        if not sound:
            memory.clear()
            return False
        self.read_blocks += 1
        return True

    def write(self, index: int, plan: BlockPlan, layout: Layout, memory: Memory, threads: Executor) -> None:
        """Keep a block's arena, if the disk takes it."""
        if self._gives_up:
            return
        view = memory.view
        sums = list(threads.map(lambda part: zlib.crc32(view[part[0] : part[1]]), _parts(memory.nbytes)))
        header = _header(plan, layout, memory.nbytes, sums)
        encoded = json.dumps(header).encode()
        partial: Path | None = None
        try:
            if not self.written_blocks:
                self._root.mkdir(parents=True, exist_ok=True)
                _remove_unused(self._all)
            descriptor, name = tempfile.mkstemp(prefix=f"{index}.", suffix=".partial", dir=self._root)
            partial = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded)
                file.seek(_start_of(header))
                file.write(view)
            partial.replace(self._file(index))
        except OSError as error:
            self._gives_up = True
            log.info("packed blocks are not kept on disk", reason=error.strerror)
            if partial is not None:
                with suppress(OSError):
                    partial.unlink()
        else:
            self.written_blocks += 1

    def _file(self, index: int) -> Path:
        return self._root / f"{index}.packed"


def _remove_unused(packed: Path) -> None:
    for kept in packed.iterdir():
        with suppress(OSError):  # another node may be removing it as well
            if kept.stat().st_mtime < time.time() - UNUSED_S:
                log.info("removing packed blocks that were not used for a month", path=str(kept))
                shutil.rmtree(kept)


def _key(checkpoint: Checkpoint, library: Library, kind: str) -> str:
    """What the packed bytes follow from. The model's id samples its weights, so their files' sizes and times enter."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted({entry.file for entry in checkpoint.tensors.values()}):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{checkpoint.model_id}-{digest.hexdigest()}-{kind}-{library.packing}.{ABI}"


def _header(plan: BlockPlan, layout: Layout, nbytes: int, sums: Iterable[int]) -> dict[str, Any]:
    places = [(slot.kind, slot.offset) for slot in layout.slots]
    pieces = [
        (slot.part, [(p.tensor.name, p.start, p.count, p.first, p.step) for p in slot.part.pieces])
        for slot in layout.slots
    ]
    described = [(type(part).__name__, _shape(part), each) for part, each in pieces]
    plan_id = hashlib.blake2b(repr((places, described, sorted(plan.vectors))).encode(), digest_size=16).hexdigest()
    return {"plan": plan_id, "nbytes": nbytes, "part_bytes": _PART_BYTES, "sums": list(sums)}


def _shape(part: Any) -> tuple[Any, ...]:
    return tuple(getattr(part, name) for name in part.__slots__ if name != "pieces")


def _read_header(descriptor: int) -> dict[str, Any] | None:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        return None
    header = json.loads(os.pread(descriptor, length, 8))
    return header if isinstance(header, dict) else None


def _start_of(header: dict[str, Any]) -> int:
    return -(-(8 + len(json.dumps(header).encode())) // _PAGE) * _PAGE


def _parts(nbytes: int) -> list[tuple[int, int]]:
    return [(start, min(start + _PART_BYTES, nbytes)) for start in range(0, nbytes, _PART_BYTES)]
