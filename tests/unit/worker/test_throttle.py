"""The throttled executor: slow as asked, on a clock of the test's own, with the inner executor's outputs."""

from __future__ import annotations

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Part
from bsns.worker.batching import Batch, Work
from bsns.worker.calibration import calibrate
from bsns.worker.sessions import Session
from bsns.worker.throttle import ThrottledExecutor, asked_block_time_s, throttled

BLOCKS = BlockRange(3, 7)


class Clocked:
    """An executor whose every batch takes `takes_s` on its own clock."""

    name, blocks, hidden_size, dtype, device = "clocked", BLOCKS, 2, "bfloat16", "cpu"

    def __init__(self, takes_s: float) -> None:
        self.now_s = 100.0
        self.takes_s = takes_s
        self.sessions: set[SessionId] = set()
        self.batches: list[Batch] = []

    def open(self, session: SessionId, max_tokens: int) -> None:
        self.sessions.add(session)

    def close(self, session: SessionId) -> None:
        self.sessions.discard(session)

    def run(self, batch: Batch) -> list[memoryview]:
        self.now_s += self.takes_s
        self.batches.append(batch)
        return [memoryview(bytes(4 * work.part.rows)) for work in batch.works]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def slow(inner: Clocked, block_time_s: float) -> ThrottledExecutor:
    return ThrottledExecutor(inner, block_time_s, clock=lambda: inner.now_s, sleep=inner.sleep)


def batch(*rows: int, blocks: BlockRange = BLOCKS) -> Batch:
    works = []
    for number, count in enumerate(rows):
        session = Session(SessionId(number), PeerId("client"), blocks, 99, 1, None, None, ())
        works.append(Work(session, Part(session.id, 0, count, 1), bytes(4 * count), 0.0))
    return Batch(blocks, works)


@pytest.mark.parametrize(
    ("rows", "blocks", "least_s"),
    [
        ((1,), BLOCKS, 0.040),
        ((1,), BlockRange(4, 5), 0.010),
        ((1, 1, 1, 1, 1), BLOCKS, 0.080),  # four further rows cost as much as the first
        ((9,), BLOCKS, 0.120),
    ],
)
def test_a_batch_takes_what_was_asked(rows: tuple[int, ...], blocks: BlockRange, least_s: float) -> None:
    inner = Clocked(0.004)
    executor = slow(inner, 0.010)
    begin_s = inner.now_s
    outputs = executor.run(batch(*rows, blocks=blocks))
    assert inner.now_s - begin_s == pytest.approx(least_s)
    assert [len(output) for output in outputs] == [4 * count for count in rows]
    assert executor.sleeps == 1
    assert executor.slept_s == pytest.approx(least_s - 0.004)


def test_who_is_slower_anyway_does_not_sleep() -> None:
    inner = Clocked(0.5)
    executor = slow(inner, 0.010)
    executor.run(batch(1))
    assert (inner.now_s, executor.sleeps, executor.slept_s) == (100.5, 0, 0.0)


def test_calibration_sees_it() -> None:
    inner = Clocked(0.0)
    executor = slow(inner, 0.010)
    calibration = calibrate(executor, clock=lambda: inner.now_s)
    assert calibration.block_time_s == pytest.approx(0.010)
    assert calibration.prefill_time_s == pytest.approx(0.010 * (1 + 127 / 4) / 128)
    assert executor.sleeps == len(inner.batches) > 2


def test_it_stands_for_the_executor_inside() -> None:
    inner = Clocked(0.004)
    executor = slow(inner, 0.010)
    executor.open(SessionId(5), 10)
    assert inner.sessions == {5}
    executor.close(SessionId(5))
    assert inner.sessions == set()
    assert (executor.blocks, executor.hidden_size, executor.dtype, executor.device) == (BLOCKS, 2, "bfloat16", "cpu")
    assert executor.name == "clocked, throttled"


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Clocked(0.004)
    monkeypatch.delenv("BSNS_BLOCK_TIME_MS", raising=False)
    assert throttled(inner) is inner
    monkeypatch.setenv("BSNS_BLOCK_TIME_MS", "2.5")
    executor = throttled(inner)
    assert isinstance(executor, ThrottledExecutor)
    assert executor.least_s(4, 1) == pytest.approx(0.010)


@pytest.mark.parametrize("text", ["slow", "0", "-1", "nan", "inf", "1e9"])
def test_a_time_that_cannot_be(text: str) -> None:
    with pytest.raises(BadOption, match="BSNS_BLOCK_TIME_MS"):
        asked_block_time_s(text)
