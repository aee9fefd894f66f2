"""Calibration on a clock of the test's own: what it says, how long it takes, and that it disturbs no session."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.model.stage import Stage
from bsns.protocol.tensors import DTYPE_BYTES
from bsns.worker.batching import Batch
from bsns.worker.calibration import CHUNK_ROWS, calibrate, time_blocks
from bsns.worker.throttle import ThrottledExecutor
from bsns.worker.torch_executor import TorchExecutor


class Clocked:
    """An executor whose blocks take `block_s` for a row and `row_s` for each further one; the first run takes more."""

    name, hidden_size, device = "clocked", 8, "cpu"

    def __init__(self, blocks: int, block_s: float, row_s: float, *, first_s: float = 0.0, dtype: str = "float32"):
        self.blocks = BlockRange(2, 2 + blocks)
        self.dtype = dtype
        self.now_s = 0.0
        self._block_s, self._row_s, self._first_s = block_s, row_s, first_s
        self.batches: list[Batch] = []

    def open(self, session: SessionId, max_tokens: int) -> None:
        raise AssertionError("calibration opens no session")

    close = open  # type: ignore[assignment]

    def run(self, batch: Batch) -> list[memoryview]:
        assert self.blocks.covers(batch.blocks)
        assert [len(work.hidden) for work in batch.works] == [batch.rows * 8 * DTYPE_BYTES[self.dtype]]
        self.now_s += len(batch.blocks) * (self._block_s + (batch.rows - 1) * self._row_s)
        self.now_s += 0.0 if self.batches else self._first_s
        self.batches.append(batch)
        return [memoryview(b"")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_quick_stage_is_timed_over_all_its_blocks(dtype: str) -> None:
    executor = Clocked(10, 0.001, 0.00002, first_s=0.2, dtype=dtype)
    found = calibrate(executor, clock=lambda: executor.now_s)
    assert found.block_time_s == pytest.approx(0.001)
    assert found.prefill_time_s == pytest.approx((0.001 + 127 * 0.00002) / 128)
    assert executor.now_s < 1.0
    assert {len(batch.blocks) for batch in executor.batches} == {1, 10}
    assert {batch.rows for batch in executor.batches} == {1, CHUNK_ROWS}


@pytest.mark.parametrize("run", range(2, 30))
def test_one_run_that_was_held_up_is_no_figure(run: int) -> None:
    executor, times = Clocked(10, 0.001, 0.00002), itertools.count()

    def clock() -> float:
        if next(times) == 2 * run + 1:  # a clock is read before a run and after it
            executor.now_s += 0.5
        return executor.now_s

    found = calibrate(executor, clock=clock)
    assert found.block_time_s == pytest.approx(0.001)
    assert found.prefill_time_s == pytest.approx((0.001 + 127 * 0.00002) / 128)


@pytest.mark.parametrize(("blocks", "block_s", "row_s"), [(40, 0.05, 0.002), (1, 0.5, 0.125), (80, 0.5, 0.125)])
def test_a_slow_stage_is_timed_on_fewer_blocks_and_rows(blocks: int, block_s: float, row_s: float) -> None:
    executor = Clocked(blocks, block_s, row_s)
    found = calibrate(executor, clock=lambda: executor.now_s)
    assert found.block_time_s == pytest.approx(block_s)
    assert row_s <= found.prefill_time_s < 2 * row_s + block_s / 8
    assert executor.now_s < 3.8


def test_a_throttled_stage_is_as_slow_as_asked() -> None:
    inner = Clocked(4, 0.001, 0.00002)

    def sleep(seconds: float) -> None:
        inner.now_s += seconds

    executor = ThrottledExecutor(inner, 0.01, clock=lambda: inner.now_s, sleep=sleep)
    assert calibrate(executor, clock=lambda: inner.now_s).block_time_s == pytest.approx(0.01)


def test_real_layers(tiny_model: Callable[[str], Path]) -> None:
    executor = TorchExecutor(Stage(tiny_model("llama"), BlockRange(0, 2), dtype="float32"), dtype="float32")
    found = calibrate(executor, clock=time.thread_time)
    assert 0 < found.prefill_time_s < found.block_time_s < 1


@pytest.mark.parametrize(("block_s", "blocks", "runs"), [(0.001, 40, 4), (0.04, 7, 4), (5.0, 0, 0)])
def test_a_node_at_rest_is_timed_shortly(block_s: float, blocks: int, runs: int) -> None:
    executor = Clocked(40, block_s, 0.0)
    found = time_blocks(executor, lambda: executor.now_s)
    assert found == pytest.approx([block_s] * max(1, runs - 1))
    assert [len(batch.blocks) for batch in executor.batches] == [1, *[blocks] * runs]
