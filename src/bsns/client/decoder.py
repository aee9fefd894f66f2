"""The decoder: the client's one compute thread, which turns activations into tokens and tokens into activations.

Whatever has arrived when the thread is free is done as one batch: one product with the head for all rows, a token for
each session, one look-up of all new tokens in the embedding. Results and next steps cross the threads once per turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from bsns.client.sampling import SamplingOptions, sample
from bsns.core.errors import BsnsError
from bsns.model.ends import Ends
from bsns.model.tensors import to_memory, to_tensor


@dataclass(slots=True)
class Answer:
    """One answer in the making: its tokens so far and how the next is chosen."""

    options: SamplingOptions
    end_tokens: frozenset[int]
    tokens: list[int]
    """Prompt and answer."""
    prompt_tokens: int
    max_tokens: int
    """Of the answer."""
    finished: str | None = None
    """`stop` or `length` once the last token is chosen."""
    sent_s: float = 0.0
    turns_ms: list[tuple[float, tuple[tuple[float, float], ...]]] = field(default_factory=list)
    """Per token: milliseconds from the step leaving this thread to its result arriving here, and its hops."""

    def choose(self, logits_V: torch.Tensor) -> int:
        """Take the next token and decide whether it is the last."""
        token = sample(logits_V, self.tokens, self.options, len(self.tokens))
        self.tokens.append(token)
        if token in self.end_tokens:
            self.finished = "stop"
        elif len(self.tokens) - self.prompt_tokens >= self.max_tokens:
            self.finished = "length"
        return token


@dataclass(slots=True)
class Arrived:
    """The last stage's row for an answer's newest position."""

    answer: Answer
    hidden: memoryview
    hops: tuple[tuple[float, float], ...] = ()


@dataclass(slots=True)
class Turned:
    """What a turn gives one answer: its next token, and the activations to step with unless it was the last."""

    answer: Answer
    token: int
    hidden: memoryview | None
    finished: str | None


OnTurned = Callable[[list[Turned]], None]
OnFailed = Callable[[list[Answer], Exception], None]
T = TypeVar("T")


class Decoder:
    """Embedding, head and sampling on a thread of their own. All methods are for the event loop's thread, where
    `on_turned` is called with each turn's tokens and `on_failed` with the answers of a turn that failed."""

    def __init__(self, ends: Ends, *, dtype: str, threads: int, on_turned: OnTurned, on_failed: OnFailed) -> None:
        self._ends = ends
        self._dtype = dtype
        self._threads = threads
        self._on_turned = on_turned
        self._on_failed = on_failed
        self._awake = threading.Condition()
        self._arrived: list[Arrived] = []
        self._calls: list[Callable[[], None]] = []
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def submit(self, arrived: Sequence[Arrived]) -> None:
        """Choose the next tokens of these answers."""
        with self._awake:
            self._arrived.extend(arrived)
            self._awake.notify()

    async def embed(self, tokens: Sequence[int], position: int) -> memoryview:
        """Activations of tokens at `position` and after, as bytes in the wire's dtype."""
        return await self._call(lambda: to_memory(self._embed(tokens, range(position, position + len(tokens)))))

    async def logits(self, hidden: memoryview, rows: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of a result's rows."""
        return await self._call(lambda: self._logits([hidden], rows))

    async def close(self) -> None:
        with self._awake:
            self._stopping = True
            self._awake.notify()
        await asyncio.to_thread(self._thread.join, 10.0)

    async def _call(self, work: Callable[[], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                value = work()
            except Exception as error:  # noqa: BLE001  crosses to the caller
                self._loop.call_soon_threadsafe(_fail, future, error)
            else:
                self._loop.call_soon_threadsafe(_settle, future, value)

        with self._awake:
            self._calls.append(run)
            self._awake.notify()
        return await future

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            with self._awake:
                while not (self._arrived or self._calls):
                    if self._stopping:
                        return
                    self._awake.wait()
                arrived, self._arrived = self._arrived, []
                calls, self._calls = self._calls, []
            if arrived:
                self._turn(arrived)
            for call in calls:
                call()

    def _turn(self, arrived: list[Arrived]) -> None:
        try:
            turned = self._choose(arrived)
        except Exception as error:  # noqa: BLE001  whatever a kernel raises must reach the answers' readers
            self._loop.call_soon_threadsafe(self._on_failed, [item.answer for item in arrived], error)
        else:
            self._loop.call_soon_threadsafe(self._on_turned, turned)

    def _choose(self, arrived: list[Arrived]) -> list[Turned]:
        now_s = time.perf_counter()
        logits_NV = self._logits([item.hidden for item in arrived], len(arrived))
        chosen: list[tuple[Answer, int]] = []
        for item, logits_V in zip(arrived, logits_NV, strict=True):
            item.answer.turns_ms.append(((now_s - item.answer.sent_s) * 1e3, item.hops))
            try:
                chosen.append((item.answer, item.answer.choose(logits_V)))
            except BsnsError as error:  # one route's bad numbers are not the other answers' trouble
                self._loop.call_soon_threadsafe(self._on_failed, [item.answer], error)
        running = [answer for answer, _ in chosen if answer.finished is None]
        rows: dict[int, memoryview] = {}
        if running:
            hidden = to_memory(self._embed([a.tokens[-1] for a in running], [len(a.tokens) - 1 for a in running]))
            row_bytes = hidden.nbytes // len(running)
            rows = {id(a): hidden[i * row_bytes : (i + 1) * row_bytes] for i, a in enumerate(running)}
        sent_s = time.perf_counter()
        for answer in running:
            answer.sent_s = sent_s
        return [Turned(answer, token, rows.get(id(answer)), answer.finished) for answer, token in chosen]

    def _logits(self, pieces: Sequence[memoryview], rows: int) -> torch.Tensor:
        hidden = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._ends.logits(to_tensor(hidden, self._dtype, (rows, self._ends.hidden_size)))

    def _embed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return self._ends.embed(torch.tensor(tokens), torch.tensor(positions))


def _settle(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
