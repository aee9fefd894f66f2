"""The shared library with the kernels: found, checked, and its functions as typed calls.

It is there where a compiler was found when BSNS was installed, or `BSNS_NATIVE_LIBRARY` says where.
`BSNS_NATIVE=0` turns it off. `python -m bsns.native.library` says what there is.

The structures mirror native/bsns_native.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_uint8, c_void_p
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from bsns.core.errors import CorruptModel, NotEnoughMemory

ABI: Final = 2
"""The version of bsns_native.h that this file mirrors."""
NAME: Final = "_native.so"
WHERE, SWITCH = "BSNS_NATIVE_LIBRARY", "BSNS_NATIVE"

_NO_MEMORY, _NOT_FINITE = 2, 3
KINDS: Final = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "float16": 4}
"""How numbers are kept, as the library counts them."""
CODECS: Final = {"int8": 0, "int8-dyn": 1, "int8-rot": 2, "int4": 3}
"""The codecs of protocol.codecs that it has, as it counts them."""


class Matrix(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("rows", c_int32), ("columns", c_int32), ("data", c_void_p))


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_size", "rotary_size", "norm")),
        *((name, c_int32) for name in ("activation", "gated", "parallel", "experts", "experts_per_token")),
        *((name, c_int32) for name in ("normalize_experts", "cache_kind")),
        *((name, c_float) for name in ("epsilon", "attention_scale", "outlier")),
    )


VECTORS: Final = (
    *("attention_norm", "attention_norm_bias", "mlp_norm", "mlp_norm_bias"),
    *("after_attention_norm", "after_mlp_norm", "query_norm", "key_norm"),
    *("qkv_bias", "out_bias", "up_bias", "down_bias"),
)
"""A block's norms and biases, by their names in `Block`."""


class Block(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("up", POINTER(Matrix)),
        ("down", POINTER(Matrix)),
        ("router", Matrix),
        *((name, c_void_p) for name in VECTORS),
        ("inverse_frequencies", c_void_p),
        ("rotary_scale", c_float),
        ("window", c_int32),
    )


class Segment(ctypes.Structure):
    _fields_ = (("cache", c_void_p), ("position", c_int32), ("rows", c_int32))


class Source(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int32) for name in ("kind", "count", "columns")),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
    )


class Misuse(RuntimeError):
    """The library was called with what it cannot take: our own mistake."""


class Library:
    """The loaded library. Raises NotEnoughMemory, CorruptModel for weights that are not finite, and Misuse."""

    def __init__(self, path: Path, calls: Any) -> None:
        self.path = path
        self._calls = calls
        _declare(calls)
        self.packing = int(calls.bsns_packing())
        self.kernels: tuple[str, ...] = tuple(calls.bsns_kernels().decode().split())
        """The sets this processor can run, best first."""

    def padded_head(self, head_size: int) -> int:
        return int(self._calls.bsns_padded_head(head_size))

    def matrix_bytes(self, kind: str, rows: int, columns: int) -> int:
        found = int(self._calls.bsns_matrix_bytes(KINDS[kind], rows, columns))
        if found < 0:
            raise Misuse(f"a matrix of {rows} × {columns} in {kind}")
        return found

    def memory(self, nbytes: int) -> Memory:
        return Memory(self, nbytes)

    def let_go(self, address: int, nbytes: int) -> None:
        """Bytes of a mapped file are not needed again."""
        self._calls.bsns_let_go(address, nbytes)

    def pack(self, matrix: Matrix, source: Source, first: int, step: int, segment: int, padded_segment: int) -> None:
        """Pack some rows; may run in several threads at once, for different rows. See bsns_pack."""
        self._check(self._calls.bsns_pack(byref(matrix), byref(source), first, step, segment, padded_segment))

    def unpack(self, matrix: Matrix) -> bytearray:
        """The matrix as it computes, (rows, columns) in float32."""
        into = bytearray(matrix.rows * matrix.columns * 4)
        self._check(self._calls.bsns_unpack(byref(matrix), (c_float * (len(into) // 4)).from_buffer(into)))
        return into

    def pool(self, threads: int, kernels: str | None = None) -> Handle:
        """`threads` that compute together, the caller among them; `kernels`: one of ours, or the best."""
        made = c_void_p()
        name = None if kernels is None else kernels.encode()
        self._check(self._calls.bsns_pool_new(threads, name, byref(made)))
        return Handle(made, self._calls.bsns_pool_free)

    def stage(self, pool: Handle, shape: Shape, blocks: Sequence[Block]) -> Handle:
        """A stage of blocks; it points into their weights, and needs the pool as long as it is."""
        made = c_void_p()
        array = (Block * len(blocks))(*blocks)
        self._check(self._calls.bsns_stage_new(pool.pointer, byref(shape), array, len(blocks), byref(made)))
        return Handle(made, self._calls.bsns_stage_free)

    def cache(self, stage: Handle, tokens: int) -> Handle:
        made = c_void_p()
        self._check(self._calls.bsns_cache_new(stage.pointer, tokens, byref(made)))
        return Handle(made, self._calls.bsns_cache_free)

    def run(
        self, stage: Handle, first: int, end: int, segments: Sequence[Segment], source: int, target: int, kind: str
    ) -> None:
        """One step; `source` and `target` are addresses of (rows, hidden) in `kind`. See bsns_stage_run."""
        array = byref(segments[0]) if len(segments) == 1 else (Segment * len(segments))(*segments)
        status = self._calls.bsns_stage_run(
            stage.pointer, first, end, array, len(segments), source, target, KINDS[kind]
        )
        self._check(status)

    def project(
        self,
        pool: Handle,
        matrix: Matrix,
        norm: int,
        norm_weight: int,
        *,
        epsilon: float,
        outlier: float,
        rows: int,
        source: int,
        kind: str,
        target: int,
    ) -> None:
        """Norm and product: `source` and `target` are addresses of (rows, columns) in `kind` and (rows, matrix rows) in
        float32. See bsns_project."""
        self._check(
            self._calls.bsns_project(
                *(pool.pointer, byref(matrix), norm, norm_weight, None, epsilon, outlier, None),
                *(rows, source, KINDS[kind], target),
            )
        )

    def read_bandwidth(self, pool: Handle, nbytes: int, seconds: float) -> float:
        """Bytes per second at which the pool's threads read so many bytes of memory at best."""
        found = c_double()
        self._check(self._calls.bsns_read_bandwidth(pool.pointer, nbytes, seconds, byref(found)))
        return found.value

    def encode(
        self, codec: str, rows: int, columns: int, kind: str, source: int, target: int, row_bytes: int
    ) -> int | None:
        """Rows at an address in a codec, at another address; which is the first that is not finite, if one is."""
        return self._code(self._calls.bsns_encode, codec, rows, columns, kind, source, target, row_bytes)

    def decode(
        self, codec: str, rows: int, columns: int, kind: str, source: int, target: int, row_bytes: int
    ) -> int | None:
        """The opposite of `encode`; which is the first row with impossible scales, if one is."""
        return self._code(self._calls.bsns_decode, codec, rows, columns, kind, source, target, row_bytes)

    def _code(
        self, call: Any, codec: str, rows: int, columns: int, kind: str, source: int, target: int, row_bytes: int
    ) -> int | None:
        bad = c_int64()
        status = call(CODECS[codec], rows, columns, KINDS[kind], source, target, row_bytes, byref(bad))
        if status == _NOT_FINITE:
            return bad.value
        self._check(status)
        return None

    def _check(self, status: int) -> None:
        if status == 0:
            return
        text = self._calls.bsns_error().decode(errors="replace")
        if status == _NO_MEMORY:
            raise NotEnoughMemory(f"{text}; free some memory, or hold fewer blocks")
        if status == _NOT_FINITE:
            raise CorruptModel(f"{text}; fetch the model again")
        raise Misuse(text)


class Handle:
    """Something the library made; freed by `close`, or with the last reference to it."""

    def __init__(self, pointer: c_void_p, free: Any) -> None:
        self._pointer = pointer
        self.close = weakref.finalize(self, free, pointer)
        """Free it. Once is enough, more does no harm."""

    @property
    def pointer(self) -> c_void_p:
        """Raises Misuse once it is closed."""
        if not self.close.alive:
            raise Misuse("it is closed")
        return self._pointer


class Memory:
    """Zeroed memory in large pages; freed by `close`, or with the last reference to it. Raises NotEnoughMemory."""

    def __init__(self, library: Library, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(library._calls.bsns_memory_new(nbytes) or 0)
        if not self.address:
            raise NotEnoughMemory(f"there are no {nbytes / 2**20:.0f} MiB of memory; free some, or hold fewer blocks")
        self.close = weakref.finalize(self, library._calls.bsns_memory_free, self.address, nbytes)

    @property
    def view(self) -> memoryview:
        """Its bytes; not to be touched once it is closed."""
        return memoryview((c_uint8 * self.nbytes).from_address(self.address)).cast("B")

    def clear(self) -> None:
        """All zeros again."""
        ctypes.memset(self.address, 0, self.nbytes)


def native_library() -> Library | str:
    """The library, or in a few words why there is none."""
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return f"turned off by {SWITCH}"
    asked = os.environ.get(WHERE)
    return _loaded(Path(asked) if asked else _installed())


@functools.cache
def _installed() -> Path:
    """Beside this file; of an editable installation the library lies where it was installed, not among the sources."""
    beside = Path(__file__).with_name(NAME)
    if beside.is_file():
        return beside
    try:
        return Path(str(distribution("bsns").locate_file(f"bsns/native/{NAME}")))
    except PackageNotFoundError:
        return beside


@functools.cache
def _loaded(path: Path) -> Library | str:
    if not path.is_file():
        if WHERE in os.environ:
            return f"{WHERE} names no file"
        return "not built: no C++ compiler was found when BSNS was installed; reinstall with one"
    try:
        calls = ctypes.CDLL(str(path))
        abi = int(calls.bsns_abi())
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if abi != ABI:
        return f"{path.name} is of interface {abi}, wanted is {ABI}; reinstall BSNS"
    library = Library(path, calls)
    return library if library.kernels else "no kernels for this processor"


def _declare(calls: Any) -> None:
    """Argument and result types, so that a pointer is never cut to an int."""
    status = c_int32
    for name, result, *arguments in (
        ("bsns_packing", c_int32),
        ("bsns_error", c_char_p),
        ("bsns_kernels", c_char_p),
        ("bsns_memory_new", c_void_p, c_int64),
        ("bsns_memory_free", None, c_void_p, c_int64),
        ("bsns_let_go", None, c_void_p, c_int64),
        ("bsns_padded_head", c_int32, c_int32),
        ("bsns_matrix_bytes", c_int64, c_int32, c_int32, c_int32),
        ("bsns_pack", status, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32),
        ("bsns_unpack", status, c_void_p, c_void_p),
        ("bsns_pool_new", status, c_int32, c_char_p, c_void_p),
        ("bsns_pool_free", None, c_void_p),
        ("bsns_stage_new", status, c_void_p, c_void_p, c_void_p, c_int32, c_void_p),
        ("bsns_stage_free", None, c_void_p),
        ("bsns_cache_new", status, c_void_p, c_int32, c_void_p),
        ("bsns_cache_free", None, c_void_p),
        ("bsns_stage_run", status, c_void_p, c_int32, c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int32),
        (
            *("bsns_project", status, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_float, c_float),
            *(c_void_p, c_int32, c_void_p, c_int32, c_void_p),
        ),
        ("bsns_encode", status, c_int32, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int64, c_void_p),
        ("bsns_decode", status, c_int32, c_int64, c_int32, c_int32, c_void_p, c_void_p, c_int64, c_void_p),
        ("bsns_read_bandwidth", status, c_void_p, c_int64, c_double, c_void_p),
    ):
        function = getattr(calls, str(name))
        function.restype, function.argtypes = result, arguments


def main() -> None:
    library = native_library()
    if isinstance(library, str):
        print(f"native executor: {library}. Without it nodes compute with torch, several times slower on CPUs.")
    else:
        print(f"native executor: kernels for {library.kernels[0]}")


if __name__ == "__main__":
    main()
