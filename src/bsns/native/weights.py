"""A block's weights, packed into one arena of memory, straight from the checkpoint's mapped file.

No second copy is ever held: each tensor is read where the file is mapped, and its pages are let go as soon as it is
packed, so that what is resident is the arena and one tensor.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import CorruptModel
from bsns.model.checkpoint import TensorEntry
from bsns.model.failures import failure
from bsns.native.architecture import BlockPlan, MatrixPlan, Rotary, VectorPlan
from bsns.native.library import KINDS, Block, Library, Matrix, Memory, Source

Numbers: TypeAlias = NDArray[np.float32]

_SOURCES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2)}
_JOB_BYTES = 1 << 20
"""What a thread packs at a time, at least: less costs more in handing out than it saves."""
_ROWS = 32  # that lie together in a packed matrix
_EMPTY_BYTES = 64


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a part lies in its block's arena, in bytes; a multiple of 64."""

    part: MatrixPlan | VectorPlan
    kind: str
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block's parts lie in its arena: those of `parts_of`, in that order."""

    slots: tuple[Slot, ...]
    nbytes: int


def parts_of(plan: BlockPlan) -> Iterator[MatrixPlan | VectorPlan]:
    yield from (plan.qkv, plan.out, *plan.up, *plan.down)
    if plan.router is not None:
        yield plan.router
    yield from plan.vectors.values()


def layout_of(library: Library, plan: BlockPlan, kind: str) -> Layout:
    """A block's arena where its weights are kept in `kind`."""
    slots: list[Slot] = []
    offset = 0
    for part in parts_of(plan):
        exact = isinstance(part, VectorPlan) or part.exact
        slots.append(Slot(part, "float32" if exact else kind, offset))
        if isinstance(part, VectorPlan):
            offset += part.numbers * 4
        else:
            offset += library.matrix_bytes(slots[-1].kind, part.rows, part.columns)
    return Layout(tuple(slots), max(offset, _EMPTY_BYTES))


class PackedBlock:
    """A block in its arena, as the library takes it."""

    def __init__(self, plan: BlockPlan, layout: Layout, memory: Memory, rotary: Rotary, frequencies: Numbers) -> None:
        """`frequencies` are the rotation's, kept by the caller: blocks that share them share their cosines."""
        self.memory = memory
        self.block = Block()
        slots = iter(layout.slots)
        matrices = [_matrix(next(slots), memory.address) for _ in range(2 + len(plan.up) + len(plan.down))]
        self.block.qkv, self.block.out = matrices[:2]
        count = len(plan.up)
        # ctypes keeps what the fields point at alive, as long as the block lives
        self.block.up = (Matrix * count)(*matrices[2 : 2 + count])
        self.block.down = (Matrix * count)(*matrices[2 + count :])
        if plan.router is not None:
            self.block.router = _matrix(next(slots), memory.address)
        for name, slot in zip(plan.vectors, slots, strict=True):
            setattr(self.block, name, memory.address + slot.offset)
        if frequencies.size:
            self.block.inverse_frequencies = frequencies.ctypes.data
        self.block.rotary_scale = rotary.scale
        self.block.window = plan.window


def pack_block(library: Library, layout: Layout, memory: Memory, files: MappedFiles, threads: Executor) -> None:
    """Fill a block's zeroed arena. Raises CorruptModel for a file that was cut, and for numbers that are not finite."""
    for slot in layout.slots:
        if isinstance(slot.part, VectorPlan):
            pack_vector(slot.part, memory, slot.offset, files)
        else:
            pack_matrix(library, slot.part, _matrix(slot, memory.address), files, threads)
        for piece in slot.part.pieces:
            files.let_go(piece.tensor)


def _matrix(slot: Slot, address: int) -> Matrix:
    assert isinstance(slot.part, MatrixPlan)
    return Matrix(KINDS[slot.kind], slot.part.rows, slot.part.columns, address + slot.offset)


@dataclass(frozen=True, slots=True)
class _Job:
    """Some rows of a piece."""

    tensor: TensorEntry
    source: Source
    first: int
    step: int


def pack_matrix(library: Library, plan: MatrixPlan, matrix: Matrix, files: MappedFiles, threads: Executor) -> None:
    """Fill a matrix of zeros. Raises CorruptModel."""

    def pack(job: _Job) -> None:
        try:
            library.pack(matrix, job.source, job.first, job.step, plan.segment, plan.padded_segment)
        except CorruptModel as error:
            raise _not_finite(job.tensor) from error

    for _ in threads.map(pack, list(_jobs(plan, files))):
        pass


def _jobs(plan: MatrixPlan, files: MappedFiles) -> Iterator[_Job]:
    for piece in plan.pieces:
        kind, item_bytes = _SOURCES[piece.tensor.dtype]
        length, width = piece.tensor.shape[-2:]
        columns = length if plan.transposed else width
        row_stride, column_stride = (1, width) if plan.transposed else (width, 1)
        each = -(-max(1, _JOB_BYTES // (columns * item_bytes)) // _ROWS) * _ROWS
        for start in range(0, piece.count, each):
            count = min(each, piece.count - start)
            address = files.address(piece.tensor) + (piece.start + start) * row_stride * item_bytes
            source = Source(address, KINDS[kind], count, columns, row_stride, column_stride)
            yield _Job(piece.tensor, source, piece.first + start * piece.step, piece.step)


def pack_vector(plan: VectorPlan, memory: Memory, offset: int, files: MappedFiles) -> None:
    """Fill a vector of zeros, `offset` bytes into the memory. Raises CorruptModel."""
    into = np.frombuffer(memory.view[offset : offset + plan.numbers * 4], np.float32)
    for piece in plan.pieces:
        numbers = files.numbers(piece.tensor)[piece.start : piece.start + piece.count] + np.float32(plan.plus)
        if not np.isfinite(numbers).all():
            raise _not_finite(piece.tensor)
        at = np.arange(piece.count)
        into[piece.first + 16 * piece.step * (at // 16) + at % 16] = numbers


def _not_finite(tensor: TensorEntry) -> CorruptModel:
    return CorruptModel(
        f"{tensor.file} is damaged: tensor {tensor.name} holds numbers that are not finite; fetch it again"
    )


class MappedFiles:
    """The checkpoint's files, mapped while their tensors are packed; a context."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._maps: dict[Path, tuple[mmap.mmap, NDArray[np.uint8]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mapped = [mapped for mapped, _ in self._maps.values()]
        self._maps.clear()
        for each in mapped:
            with suppress(BufferError):  # an error's trace may still look at it: then it goes with that
                each.close()

    def address(self, tensor: TensorEntry) -> int:
        """Where the tensor's first byte lies in memory."""
        return int(self._bytes(tensor.file, tensor.offset + tensor.nbytes).ctypes.data) + tensor.offset

    def numbers(self, tensor: TensorEntry) -> Numbers:
        """A copy of the tensor in float32, flat."""
        raw = self._bytes(tensor.file, tensor.offset + tensor.nbytes)[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.dtype == "BF16":
            return (np.frombuffer(raw.tobytes(), np.uint16).astype(np.uint32) << 16).view(np.float32)
        half = np.float32 if tensor.dtype == "F32" else np.float16
        return np.frombuffer(raw.tobytes(), half).astype(np.float32)

    def let_go(self, tensor: TensorEntry) -> None:
        self._library.let_go(self.address(tensor), tensor.nbytes)

    def _bytes(self, file: Path, reach: int) -> NDArray[np.uint8]:
        """The mapped file. Raises CorruptModel if it is not long enough by now."""
        if file not in self._maps:
            try:
                with file.open("rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: it is empty
                raise failure(error, file) from error
            self._maps[file] = mapped, np.frombuffer(mapped, np.uint8)
        whole = self._maps[file][1]
        if whole.size < reach:
            raise CorruptModel(
                f"{file} is damaged: it should be {reach} bytes long and is {whole.size}; fetch it again"
            )
        return whole


def frequencies_of(rotaries: Sequence[Rotary]) -> list[Numbers]:
    """The rotations' inverse frequencies, for the library to read."""
    return [np.array(rotary.inverse_frequencies, np.float32) for rotary in rotaries]
