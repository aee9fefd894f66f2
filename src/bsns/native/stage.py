"""A stage: one contiguous range of a model's blocks, computed by the native kernels from packed weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadRange
from bsns.model.checkpoint import Checkpoint
from bsns.model.configuration import read_config
from bsns.native import library as native
from bsns.native.architecture import Architecture, NotNative, describe
from bsns.native.library import KINDS, Handle, Library, Misuse, native_library
from bsns.native.packed_cache import PackedCache
from bsns.native.weights import MappedFiles, Numbers, PackedBlock, frequencies_of, layout_of, pack_block
from bsns.protocol.frames import Buffer

OUTLIER: Final = 6.0
"""Activations of at least this size are kept out of int8: larger features are outliers (LLM.int8, Dettmers 2022)."""
SAME: Final = "same"
CACHES: Final = (SAME, "int8")
KEPT_ON_DISK: Final = ("int8", "int4")
"""Kinds worth keeping packed: the others are packed about as fast as they are read."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}

Cache: TypeAlias = Handle
"""A session's keys and values on all blocks of a stage; `close` frees it, never while a step uses it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's new tokens in a batch, `rows` of them, the first at `position`."""

    cache: Cache
    position: int
    rows: int


class NativeStage:
    """Blocks [start, end) of a model, ready to run batches. Not thread-safe: one caller at a time.

    Everything is freed by `close`, or with the last reference.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: BlockRange,
        *,
        dtype: str = "bfloat16",
        weights: str = SAME,
        cache: str = SAME,
        threads: int = 1,
        kernels: str | None = None,
        kept: PackedCache | bool = True,
    ) -> None:
        """Load the range. `dtype` is that of activations; `weights` and `cache` may be kept in fewer bits.

        `kernels`: a set of Library.kernels, for tests; `kept`: where packed blocks are kept on disk, or whether they
        are. Raises NotNative, BadRange, CorruptModel, NotEnoughMemory, UnsupportedModel.
        """
        library = native_library()
        if isinstance(library, str):
            raise NotNative(library)
        if blocks.end > checkpoint.block_count:
            raise BadRange(f"blocks {blocks} do not exist: this model has blocks 0:{checkpoint.block_count}")
        self.blocks = blocks
        self.dtype = dtype
        self.weights = dtype if weights == SAME else weights
        self.cache = dtype if cache == SAME else cache
        self.hidden_size = checkpoint.hidden_size
        self.row_bytes = self.hidden_size * _ITEM_BYTES[dtype]
        self._library: Library = library
        self.architecture: Architecture = describe(
            checkpoint, read_config(checkpoint.path), blocks, library.padded_head
        )
        if kept is True:
            kept = self.weights in KEPT_ON_DISK and PackedCache(checkpoint, library, self.weights)
        self.kept: PackedCache | None = kept or None
        self.weight_bytes = 0
        """Packed weights of all blocks."""
        resources = ExitStack()
        self.close = weakref.finalize(self, resources.close)
        """Free everything; no step may run. Once is enough, more does no harm."""
        try:
            self._load(resources, threads, kernels)
        except BaseException:
            self.close()
            raise

    def _load(self, resources: ExitStack, threads: int, kernels: str | None) -> None:
        library, architecture = self._library, self.architecture
        frequencies = frequencies_of(architecture.rotaries)
        # in this order: where one thread fails, the others are waited for before the files are unmapped under them
        with MappedFiles(library) as files, ThreadPoolExecutor(threads, thread_name_prefix="packing") as packers:
            packed = [self._block(index, frequencies, files, packers, resources) for index in range(len(self.blocks))]
        resources.callback(frequencies.clear)  # they live as long as the stage that points at them
        pool = resources.enter_context(closing(library.pool(threads, kernels)))
        stage = library.stage(pool, self._shape(), [each.block for each in packed])
        self._stage = resources.enter_context(closing(stage))

    def _block(
        self, index: int, frequencies: list[Numbers], files: MappedFiles, packers: Executor, resources: ExitStack
    ) -> PackedBlock:
        library, plan = self._library, self.architecture.blocks[index]
        layout = layout_of(library, plan, self.weights)
        memory = resources.enter_context(closing(library.memory(layout.nbytes)))
        self.weight_bytes += layout.nbytes
        number = self.blocks.start + index
        if self.kept is None or not self.kept.read(number, plan, layout, memory, packers):
            pack_block(library, layout, memory, files, packers)
            if self.kept is not None:
                self.kept.write(number, plan, layout, memory, packers)
        rotary = self.architecture.rotaries[plan.rotary]
        return PackedBlock(plan, layout, memory, rotary, frequencies[plan.rotary])

    def _shape(self) -> native.Shape:
        shape = native.Shape(cache_kind=KINDS[self.cache], outlier=OUTLIER if self.weights in KEPT_ON_DISK else 0.0)
        for name in (field for field, *_ in native.Shape._fields_):
            if name not in ("cache_kind", "outlier"):
                setattr(shape, name, getattr(self.architecture, name))
        return shape

    def open(self, max_tokens: int) -> Cache:
        """Room for a session; it becomes resident as it is written. Raises NotEnoughMemory."""
        return self._library.cache(self._stage, max_tokens)

    def run(self, segments: Sequence[Segment], hidden: Buffer, blocks: BlockRange | None = None) -> memoryview:
        """One step of all segments through `blocks` (default: the whole range): the bytes of (rows, hidden) in and out.

        Each segment's keys and values are written to its cache at its position. Raises BadRange, NotEnoughMemory.
        """
        blocks = blocks or self.blocks
        if not self.blocks.covers(blocks):
            raise BadRange(f"blocks {blocks} are not within this stage's {self.blocks}")
        source = np.frombuffer(hidden, np.uint8)
        rows = sum(segment.rows for segment in segments)
        if source.size != rows * self.row_bytes:
            raise Misuse(f"{source.size} bytes are not {rows} rows of {self.row_bytes}")
        output = np.empty(source.size, np.uint8)
        first, end = blocks.start - self.blocks.start, blocks.end - self.blocks.start
        parts = [native.Segment(each.cache.pointer, each.position, each.rows) for each in segments]
        self._library.run(self._stage, first, end, parts, source.ctypes.data, output.ctypes.data, self.dtype)
        return output.data
