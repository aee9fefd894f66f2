"""Codecs: inside their bounds on any finite input, the same bits from kernels and numpy, sound with hostile bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from bsns.compression import plain, rows
from bsns.compression.plain import NotFinite
from bsns.native.library import native_library
from bsns.protocol.codecs import CODECS, RAW, Codec

DTYPES = ("float32", "bfloat16", "float16")
LOSSY = [codec for codec in CODECS.values() if codec.name != RAW]

finite_rows = st.tuples(st.integers(0, 4), st.integers(1, 200)).flatmap(
    lambda shape: arrays.arrays(
        np.float32, shape, elements=st.floats(width=32, allow_nan=False, allow_infinity=False), fill=st.just(0.0)
    )
)
WIDE = (np.random.default_rng(0).uniform(-1, 1, (3, 1100)) * np.array([[1.0], [3e38], [1e-38]])).astype(np.float32)


def in_dtype(values: NDArray[np.float32], dtype: str) -> tuple[bytes, NDArray[np.float32]]:
    """Values in a dtype: their bytes, and what they are there."""
    data = plain.in_dtype(values, dtype).tobytes()
    return data, plain.numbers(data, dtype, values.shape)  # type: ignore[arg-type]


def there_and_back(codec: str, data: bytes, dtype: str, columns: int) -> NDArray[np.float32]:
    coded = memoryview(rows.encode(codec, data, dtype, columns))
    count = len(data) // CODECS[RAW].row_bytes(columns, dtype)
    assert coded.nbytes == count * CODECS[codec].row_bytes(columns, dtype)
    back = memoryview(rows.decode(codec, coded, dtype, columns))
    assert back.nbytes == len(data)
    return plain.numbers(back, dtype, (count, columns))


def blocks(codec: Codec, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each number the greatest of its block."""
    size = codec.block or 1
    found = np.abs(values.astype(np.float64))
    for start in range(0, values.shape[1], size):
        block = found[:, start : start + size]
        block[:] = block.max(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
@settings(max_examples=60)
@given(values=finite_rows)
@example(values=WIDE)
@example(values=np.full((1, 70), 3.4e38, np.float32))
@example(values=np.full((2, 577), -1e-44, np.float32))
@example(values=np.zeros((0, 5), np.float32))
def test_every_number_comes_back_within_the_bound(codec: Codec, dtype: str, values: NDArray[np.float32]) -> None:
    data, there = in_dtype(values, dtype)
    back = there_and_back(codec.name, data, dtype, values.shape[1]).astype(np.float64)
    assert np.isfinite(back).all()
    error = np.abs(back - there)
    rounding = {"float32": 2.0**-22, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
    least = {"float32": 1e-27, "bfloat16": 1e-27, "float16": 6e-8}[dtype]
    if not codec.rotated:
        assert (error <= (codec.step + rounding) * blocks(codec, there) + least).all()
    lengths = np.linalg.norm(there.astype(np.float64), axis=1)
    bound = codec.error_bound(values.shape[1], dtype)
    assert (np.linalg.norm(error, axis=1) <= bound * lengths + least * values.shape[1]).all()


@pytest.mark.skipif(isinstance(native_library(), str), reason=f"no kernels: {native_library()}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ["int8", "int8-dyn", "int8-rot", "int4"])
@settings(max_examples=60)
@given(values=finite_rows)
@example(values=WIDE)
@example(values=np.full((1, 4097), 3.4e38, np.float32))
def test_kernels_and_numpy_give_the_same_bits(codec: str, dtype: str, values: NDArray[np.float32]) -> None:
    data, there = in_dtype(values, dtype)
    columns = values.shape[1]
    coded = bytes(rows.encode(codec, data, dtype, columns))
    expected = plain.encode(CODECS[codec], there)
    assert coded == expected.tobytes()
    assert (
        bytes(rows.decode(codec, coded, dtype, columns))
        == plain.in_dtype(plain.decode(CODECS[codec], expected, columns), dtype).tobytes()
    )


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_rows_are_encoded_each_by_itself(codec: Codec) -> None:
    """So that a journal may be cut anywhere, and batches joined."""
    values = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    together = bytes(rows.encode(codec.name, values.tobytes(), "float32", 96))
    assert together == b"".join(bytes(rows.encode(codec.name, row.tobytes(), "float32", 96)) for row in values)


def test_raw_is_passed_through() -> None:
    data = bytes(16)
    assert rows.encode(RAW, data, "bfloat16", 4) is data
    assert rows.decode(RAW, data, "bfloat16", 4) is data


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_what_is_not_finite_is_told(codec: Codec, bad: float, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("BSNS_NATIVE", "0")
    values = np.ones((4, 130), np.float32)
    values[2, 129] = bad
    with pytest.raises(NotFinite) as told:
        rows.encode(codec.name, values.tobytes(), "float32", 130)
    assert told.value.row == 2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("codec", [codec for codec in LOSSY if codec.block], ids=lambda codec: codec.name)
def test_scales_that_no_encoder_writes_are_told(codec: Codec, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setenv("BSNS_NATIVE", "0")
    coded = bytearray(rows.encode(codec.name, np.ones((3, 64), np.float32).tobytes(), "float32", 64))
    row_bytes = codec.row_bytes(64, "float32")
    for scale in (
        b"\xff" * codec.scale_bytes,
        (b"\x80\x7f" * 2)[-codec.scale_bytes :],
        b"\x80\xbf\x80\xbf"[: codec.scale_bytes],
    ):
        hostile = bytearray(coded)
        hostile[row_bytes : row_bytes + codec.scale_bytes] = scale
        with pytest.raises(NotFinite) as told:
            rows.decode(codec.name, hostile, "float32", 64)
        assert told.value.row == 1


@settings(max_examples=100)
@given(data=st.data(), columns=st.integers(1, 150), codec=st.sampled_from([codec for codec in LOSSY if codec.block]))
def test_any_bytes_are_taken_or_refused(data: st.DataObject, columns: int, codec: Codec) -> None:
    coded = data.draw(st.binary(min_size=(size := codec.row_bytes(columns, "bfloat16")), max_size=size))
    try:
        back = rows.decode(codec.name, coded, "bfloat16", columns)
    except NotFinite:
        return
    assert np.isfinite(plain.numbers(back, "bfloat16", (1, columns))).all()


def test_the_dynamic_map() -> None:
    entries = plain.dynamic_map()
    assert len(set(entries.tolist())) == 256
    assert (np.diff(entries) > 0).all()
    assert entries[0] == np.float32(-0.99296875)
    assert entries[-2] == np.float32(0.99296875)
    assert entries[-1] == 1.0
    assert entries[127] == 0.0
    assert abs(entries[128] - 5.5e-7) < 1e-12


@pytest.mark.parametrize(("columns", "count"), [(576, 1), (4096, 2048)])
@pytest.mark.parametrize("codec", ["int8", "int8-dyn", "int8-rot"])
def test_eight_bits_are_half_of_sixteen(codec: str, columns: int, count: int) -> None:
    raw = count * CODECS[RAW].row_bytes(columns, "bfloat16")
    assert count * CODECS[codec].row_bytes(columns, "bfloat16") <= 0.53 * raw


def outliers(columns: int = 576) -> NDArray[np.float32]:
    """Activations with three channels a hundred times as great as the rest."""
    values = np.random.default_rng(2).standard_normal((64, columns)).astype(np.float32)
    values[:, [7, 200, 401]] *= 100
    return values


def relative_error(codec: str, values: NDArray[np.float32]) -> float:
    back = there_and_back(codec, values.tobytes(), "float32", values.shape[1])
    return float(np.linalg.norm(back - values) / np.linalg.norm(values))


def test_a_rotation_keeps_outliers_from_spoiling_the_rest() -> None:
    values = outliers()
    assert relative_error("int8-rot", values) * 3 <= relative_error("int8", values)


def test_torch_agrees_on_bfloat16() -> None:
    values = np.random.default_rng(3).standard_normal((2, 33)).astype(np.float32)
    tensor: Any = torch.from_numpy(values).bfloat16()
    assert bytes(rows.encode("bf16", values.tobytes(), "float32", 33)) == tensor.view(torch.uint8).numpy().tobytes()
