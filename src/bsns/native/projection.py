"""The end of a model on the native kernels: last norm and head, from activations to logits."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray

from bsns.model.checkpoint import Checkpoint, TensorEntry
from bsns.native.architecture import MatrixPlan, NotNative, Piece, VectorPlan
from bsns.native.families import RMS_NORM
from bsns.native.library import KINDS, Matrix, native_library
from bsns.native.stage import KEPT_ON_DISK, OUTLIER
from bsns.native.weights import MappedFiles, pack_matrix, pack_vector
from bsns.protocol.frames import Buffer

_NORM = "model.norm.weight"
_HEADS = ("lm_head.weight", "model.embed_tokens.weight")  # the second where they are tied
_ALIGNED = 64  # numbers


class Projection:
    """Of a model laid out like Llama, with an RMS norm and no bias. Not thread-safe: one caller at a time."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, weights: str, threads: int = 1) -> None:
        """`dtype` is that of activations. Raises NotNative, CorruptModel, NotEnoughMemory."""
        library = native_library()
        if isinstance(library, str):
            raise NotNative(library)
        head = next((checkpoint.tensors[name] for name in _HEADS if name in checkpoint.tensors), None)
        norm = checkpoint.tensors.get(_NORM)
        if head is None or norm is None:
            raise NotNative("its last norm and head are not where Llama has them")
        if dtype not in ("float32", "bfloat16"):
            raise NotNative(f"dtype {dtype}")
        epsilon = checkpoint.config.get("rms_norm_eps")
        if not isinstance(epsilon, (int, float)):
            raise NotNative("its configuration has no rms_norm_eps")
        self._library, self._dtype, self._epsilon = library, dtype, float(epsilon)
        self._outlier = OUTLIER if weights in KEPT_ON_DISK else 0.0
        resources = ExitStack()
        self.close = weakref.finalize(self, resources.close)
        """Free everything. Once is enough, more does no harm."""
        try:
            self._load(resources, head, norm, weights, threads)
        except BaseException:
            self.close()
            raise

    def _load(self, resources: ExitStack, head: TensorEntry, norm: TensorEntry, weights: str, threads: int) -> None:
        rows, columns = head.shape
        self.nbytes = self._library.matrix_bytes(weights, rows, columns)
        numbers = -(-columns // _ALIGNED) * _ALIGNED
        memory = resources.enter_context(closing(self._library.memory(self.nbytes + 4 * numbers)))
        self._matrix = Matrix(KINDS[weights], rows, columns, memory.address)
        self._norm = memory.address + self.nbytes
        plan = MatrixPlan(rows, columns, (Piece(head, 0, rows, 0),), columns, columns)
        with MappedFiles(self._library) as files, ThreadPoolExecutor(threads, thread_name_prefix="packing") as packers:
            pack_matrix(self._library, plan, self._matrix, files, packers)
            pack_vector(VectorPlan(numbers, (Piece(norm, 0, columns, 0),)), memory, self.nbytes, files)
        self._pool = resources.enter_context(closing(self._library.pool(threads)))

    def logits(self, hidden: Buffer) -> NDArray[np.float32]:
        """The last block's activations, the bytes of (rows, hidden), as logits (rows, vocabulary)."""
        source = np.frombuffer(hidden, np.uint8)
        rows = source.size // (self._matrix.columns * (4 if self._dtype == "float32" else 2))
        output = np.empty((rows, self._matrix.rows), np.float32)
        self._library.project(
            self._pool,
            self._matrix,
            RMS_NORM,
            self._norm,
            epsilon=self._epsilon,
            outlier=self._outlier,
            rows=rows,
            source=source.ctypes.data,
            kind=self._dtype,
            target=output.ctypes.data,
        )
        return output
