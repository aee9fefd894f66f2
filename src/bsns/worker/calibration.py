"""Calibration: a short timed run of a stage's real layers, so that others may plan with what it can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.core.plan import ROWS_PER_BLOCK_TIME
from bsns.model.tensors import TORCH_DTYPES, to_memory
from bsns.protocol.inference import Part
from bsns.worker.batching import Batch, Work
from bsns.worker.executor import Executor
from bsns.worker.sessions import Session

CHUNK_ROWS = 128
"""Prompt tokens in the chunk that is timed: enough for the weights to be read once for many."""
MAX_REPEATS = 9
LEAST_REPEATS = 3
"""Of runs that are expected to be short: one that was held up is no figure. Of others one will do."""
BUDGET_S = 0.3
"""What the repeats of each of the two figures may take, beside a warm-up and the least of them."""
RETIMED = 3
LONG_S = 1.0
"""No run shall be expected to take longer: a slow node times a smaller chunk."""

_NOBODY = SessionId(-1)
"""A session that is not open: it is computed against an empty cache, and no other session hears of it."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds that one average block takes: for one new token, and for each prompt token of a chunk."""

    block_time_s: float
    prefill_time_s: float


def calibrate(executor: Executor, *, clock: Callable[[], float] = time.perf_counter) -> Calibration:
    """Time a stage's layers: well under a second for those that are quick, some 3 s at half a second a block.

    Medians of runs after a warm-up, over all its blocks where the budget allows it: one block alone would stay in the
    processor's cache, and look faster than it is in its row. Nothing else may run meanwhile.
    """
    first = BlockRange(executor.blocks.start, executor.blocks.start + 1)
    warm_s = _run_s(executor, first, 1, clock)
    if warm_s < BUDGET_S:
        warm_s = _run_s(executor, first, 1, clock)  # what the very first run pays once is no figure
    rows = max(1, min(CHUNK_ROWS, math.floor(ROWS_PER_BLOCK_TIME * LONG_S / max(warm_s, 1e-9))))
    block_time_s = _median_s(executor, 1, warm_s, clock)
    chunk_s = _median_s(executor, rows, _run_s(executor, first, rows, clock), clock)
    return Calibration(block_time_s, chunk_s / rows)


def time_blocks(executor: Executor, clock: Callable[[], float]) -> list[float]:
    """What an average block takes for one new token, a few times after a warm-up: in a node that serves already, whose
    steps have to wait meanwhile. Of a node that turns out to be slow fewer blocks are timed."""
    first_s = _run_s(executor, BlockRange(executor.blocks.start, executor.blocks.start + 1), 1, clock)
    count = min(len(executor.blocks), math.floor(BUDGET_S / max(first_s, 1e-9)))
    if count < 1:
        return [first_s]
    blocks = BlockRange(executor.blocks.start, executor.blocks.start + count)
    _run_s(executor, blocks, 1, clock)
    return [_run_s(executor, blocks, 1, clock) / count for _ in range(RETIMED)]


def _median_s(executor: Executor, rows: int, expected_s: float, clock: Callable[[], float]) -> float:
    """An average block's median seconds for a step of so many rows; one block is expected to take `expected_s`."""
    count = max(1, min(len(executor.blocks), math.floor(BUDGET_S / 3 / max(expected_s, 1e-9))))
    blocks = BlockRange(executor.blocks.start, executor.blocks.start + count)
    if count > 1:
        _run_s(executor, blocks, rows, clock)  # so far only the first block is warm
    least = LEAST_REPEATS if LEAST_REPEATS * count * expected_s <= BUDGET_S else 1
    times_s = [_run_s(executor, blocks, rows, clock)]
    while len(times_s) < MAX_REPEATS and (len(times_s) < least or sum(times_s) + times_s[-1] <= BUDGET_S):
        times_s.append(_run_s(executor, blocks, rows, clock))
    return statistics.median(times_s) / count


def _run_s(executor: Executor, blocks: BlockRange, rows: int, clock: Callable[[], float]) -> float:
    noise = torch.rand(rows, executor.hidden_size, generator=torch.Generator().manual_seed(rows)) - 0.5
    hidden = to_memory(noise.to(TORCH_DTYPES[executor.dtype]))  # noise, lest a router sends all rows the same way
    session = Session(_NOBODY, PeerId(""), blocks, rows, 1, None, None, ())
    work = Work(session, Part(_NOBODY, 0, rows, 0), hidden, 0.0)
    started_s = clock()
    executor.run(Batch(blocks, [work]))
    return clock() - started_s
