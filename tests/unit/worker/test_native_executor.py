"""The native executor: sessions come and go while a batch runs, and no cache is freed under it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from native_stages import Part as Rows
from native_stages import needs_native, rows_of

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.model.checkpoint import read_checkpoint
from bsns.model.stage import Stage
from bsns.model.tensors import to_memory
from bsns.native.library import Misuse
from bsns.native.stage import NativeStage
from bsns.protocol.inference import Part
from bsns.worker.batching import Batch, Work
from bsns.worker.native_executor import NativeExecutor
from bsns.worker.sessions import Session
from bsns.worker.torch_executor import TorchExecutor

pytestmark = needs_native
BLOCKS = BlockRange(1, 4)
HIDDEN = 32


@pytest.fixture
def stage(tiny_model: Callable[[str], Path]) -> Iterator[NativeStage]:
    with closing(NativeStage(read_checkpoint(tiny_model("llama")), BLOCKS, dtype="float32")) as stage:
        yield stage


def work(session: int, position: int, rows: int) -> Work:
    hidden = to_memory(rows_of(Rows(str(session), position, rows), HIDDEN))
    id_ = SessionId(session)
    return Work(
        Session(id_, PeerId("client"), BLOCKS, 64, 1, None, None, ()), Part(id_, position, rows, 0), hidden, 0.0
    )


def batch(*works: Work, blocks: BlockRange = BLOCKS) -> Batch:
    return Batch(blocks, works)


def numbers(output: memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(output), dtype=torch.float32).view(-1, HIDDEN)


def test_it_says_what_it_is(stage: NativeStage) -> None:
    executor = NativeExecutor(stage)
    assert (executor.name, executor.device, executor.dtype) == ("native", "cpu", "float32")
    assert (executor.blocks, executor.hidden_size) == (BLOCKS, HIDDEN)


def test_it_equals_the_torch_executor_batch_by_batch(stage: NativeStage, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")
    both = (NativeExecutor(stage), TorchExecutor(Stage(path, BLOCKS, dtype="float32"), dtype="float32"))
    for executor in both:
        for session in (1, 2, 3):
            executor.open(SessionId(session), 64)
    for one in (
        batch(work(1, 0, 9)),
        batch(work(2, 0, 1), work(1, 9, 1), work(3, 0, 20)),
        batch(work(1, 4, 2), work(3, 20, 1)),
        batch(work(1, 6, 1), work(4, 3, 2), blocks=BlockRange(2, 4)),  # 4 is not open
    ):
        outputs = [executor.run(one) for executor in both]
        for position, (actual, expected) in enumerate(zip(*outputs, strict=True)):
            if one.works[position].part.session != 4:
                assert float((numbers(actual) - numbers(expected)).abs().max()) <= 1e-4
            assert len(actual) == len(expected)
    for executor in both:
        for session in (1, 2, 3, 4):
            executor.close(SessionId(session))


def test_a_closed_session_computes_against_an_empty_cache(stage: NativeStage) -> None:
    executor = NativeExecutor(stage)
    executor.open(SessionId(1), 64)
    executor.run(batch(work(1, 0, 5)))
    kept = executor.run(batch(work(1, 5, 1)))[0]
    executor.close(SessionId(1))
    executor.close(SessionId(1))
    lost = executor.run(batch(work(1, 5, 1)))[0]
    assert len(lost) == len(kept)
    assert bytes(lost) != bytes(kept)


def test_a_session_opened_again_begins_anew(stage: NativeStage) -> None:
    executor = NativeExecutor(stage)
    executor.open(SessionId(1), 64)
    executor.run(batch(work(1, 0, 5)))
    executor.open(SessionId(1), 32)
    with pytest.raises(Misuse, match="beyond its cache"):
        executor.run(batch(work(1, 32, 1)))


class Halting:
    """A stage that stands still in the middle of a step."""

    def __init__(self, inner: NativeStage) -> None:
        self._inner = inner
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def run(self, *arguments: object) -> memoryview:
        self.entered.set()
        assert self.go_on.wait(10)
        return self._inner.run(*arguments)  # type: ignore[arg-type]


def test_a_cache_in_use_is_freed_when_its_batch_is_done(stage: NativeStage) -> None:
    halting = Halting(stage)
    executor = NativeExecutor(halting)  # type: ignore[arg-type]
    for session in (1, 2):
        executor.open(SessionId(session), 64)
    caches = dict(executor._caches)
    outputs: list[list[memoryview]] = []
    running = threading.Thread(target=lambda: outputs.append(executor.run(batch(work(1, 0, 3)))))
    running.start()
    assert halting.entered.wait(10)
    executor.close(SessionId(1))
    executor.close(SessionId(2))
    executor.open(SessionId(1), 64)  # the same session again, while the old cache is in use
    assert caches[SessionId(1)].close.alive, "freed under a running batch"
    assert not caches[SessionId(2)].close.alive
    halting.go_on.set()
    running.join(10)
    assert not caches[SessionId(1)].close.alive
    assert executor._caches[SessionId(1)].close.alive
    alone = NativeExecutor(stage)
    alone.open(SessionId(1), 64)
    assert bytes(outputs[0][0]) == bytes(alone.run(batch(work(1, 0, 3)))[0])


def test_a_batch_that_fails_holds_nothing(stage: NativeStage) -> None:
    executor = NativeExecutor(stage)
    executor.open(SessionId(1), 4)
    cache = executor._caches[SessionId(1)]
    with pytest.raises(Misuse):
        executor.run(batch(work(1, 4, 1)))
    assert not executor._in_use
    executor.close(SessionId(1))
    assert not cache.close.alive


def test_sessions_come_and_go_while_batches_run(stage: NativeStage) -> None:
    """The witness is the sanitizer, and the process that lives."""
    executor = NativeExecutor(stage)
    expected = bytes(executor.run(batch(work(0, 0, 8)))[0])
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for session in range(1, 5):
                executor.open(SessionId(session), 16)
            for session in range(1, 5):
                executor.close(SessionId(session))

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for _ in range(200):
            outputs = executor.run(batch(work(0, 0, 8), *(work(session, 0, 2) for session in range(1, 5))))
            assert bytes(outputs[0]) == expected
    finally:
        ended.set()
        churning.join(10)
