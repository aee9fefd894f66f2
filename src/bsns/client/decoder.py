"""The decoder: turns activations into tokens and tokens into activations.

Whatever has arrived when it is free is done as one batch, a turn: one product with the head for all rows, a token for
each session, one look-up of all new tokens in the embedding. Turns that are short run on the event loop, for handing
them to a thread and back costs 0.1 ms a token; long ones (large vocabularies, many sessions) run on a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from bsns.client.sampling import Constraint, Logprobs, SamplingOptions, logprobs, sample
from bsns.client.speculation import Guesser
from bsns.compression.rows import encode
from bsns.core.errors import BsnsError
from bsns.core.ids import SessionId
from bsns.model.ends import Ends
from bsns.model.tensors import to_memory, to_tensor
from bsns.protocol.codecs import RAW
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import Passed
from bsns.transport.clock import MACHINE_CLOCK, Clock


@dataclass(slots=True)
class Answer:
    """One answer in the making: its tokens so far and how the next is chosen."""

    session: SessionId
    options: SamplingOptions
    end_tokens: frozenset[int]
    tokens: list[int]
    """Prompt and answer."""
    prompt_tokens: int
    max_tokens: int
    """Of the answer."""
    codec: str = RAW
    """Of what is sent into its route."""
    guesser: Guesser | None = None
    guesses: list[int] = field(default_factory=list)
    """Tokens that were sent along after the newest, to be checked."""
    finished: str | None = None
    """`stop` or `length` once the last token is chosen."""
    sent_s: float = 0.0
    turns_ms: list[tuple[float, tuple[Passed, ...]]] = field(default_factory=list)
    """Per token: milliseconds from the step leaving this thread to its result arriving here, and its hops."""
    constraint: Constraint | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    """Per token of the answer, if its options ask for them."""

    @property
    def guesses_quickly(self) -> bool:
        return self.guesser is None or self.guesser.quick

    def choose(self, logits_V: torch.Tensor) -> int:
        """Take the next token and decide whether it is the last."""
        allowed_V = logits_V if self.constraint is None else self.constraint.mask(logits_V)
        token = sample(allowed_V, self.tokens, self.options, len(self.tokens), self.prompt_tokens)
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.options.logprobs is not None:
            self.logprobs.append(logprobs(logits_V, token, self.options.logprobs))
        self.tokens.append(token)
        if token in self.end_tokens:
            self.finished = "stop"
        elif len(self.tokens) - self.prompt_tokens >= self.max_tokens:
            self.finished = "length"
        return token

    def draw(self, logits_RV: torch.Tensor) -> list[int]:
        """Take the next tokens: one, and one more for each guess that was right. `logits_RV`: of the newest token and
        of each guess after it."""
        drawn: list[int] = []
        for guess, logits_V in zip([*self.guesses, None], logits_RV, strict=True):
            drawn.append(self.choose(logits_V))
            if self.finished is not None or drawn[-1] != guess:
                break
        return drawn

    def guess(self, right: int, now_s: float) -> None:
        """Guess what follows, as far as the answer may go; so many of the guesses before were right."""
        if self.guesser is None:
            return
        if len(self.turns_ms) > 1:  # the first is the prompt's
            computing_ms = sum(hop.computing_ms for hop in self.turns_ms[-1][1])
            self.guesser.took(1 + len(self.guesses), right, now_s - self.sent_s, computing_ms / 1e3)
        left = self.max_tokens - (len(self.tokens) - self.prompt_tokens)
        self.guesses = self.guesser.guess(self.tokens, left - 1)


@dataclass(slots=True)
class Arrived:
    """The last stage's rows for an answer's newest token and the guesses after it."""

    answer: Answer
    hidden: Buffer
    hops: tuple[Passed, ...] = ()


@dataclass(slots=True)
class Turned:
    """What a turn gives one answer: its next tokens, and the activations to step with unless it has ended."""

    answer: Answer
    tokens: list[int]
    guesses: list[int]
    """What is to be sent along after the last of them."""
    hidden: Buffer | None
    """Of the last and the guesses, in its answer's codec."""
    finished: str | None


SHORT_S = 0.005
"""Such turns run on the event loop."""

OnTurned = Callable[[list[Turned]], None]
OnFailed = Callable[[list[Answer], Exception], None]


class Decoder:
    """Embedding, head and sampling. All methods are for the event loop's thread, where `on_turned` is called with each
    turn's tokens and `on_failed` with the answers of a turn that failed."""

    def __init__(
        self,
        ends: Ends,
        *,
        dtype: str,
        threads: int,
        on_turned: OnTurned,
        on_failed: OnFailed,
        clock: Clock = MACHINE_CLOCK,
        short_s: float = SHORT_S,
    ) -> None:
        """Turns that took less than `short_s` lately run on the event loop."""
        torch.set_num_threads(threads)
        self._ends = ends
        self._dtype = dtype
        self._on_turned = on_turned
        self._on_failed = on_failed
        self._arrived: list[Arrived] = []
        self._turning = False
        self._now_s = clock.now_s
        self._short_s = self._turn_s = short_s
        """How long a turn took lately."""
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    def submit(self, arrived: Sequence[Arrived]) -> None:
        """Choose the next tokens of these answers."""
        self._arrived.extend(arrived)
        self._turn()

    async def embed(self, tokens: Sequence[int], position: int, codec: str = RAW) -> Buffer:
        """Activations of tokens at `position` and after, as bytes of a codec."""
        return await self._loop.run_in_executor(
            self._thread, lambda: self._coded(tokens, range(position, position + len(tokens)), codec)
        )

    async def logits(self, hidden: Buffer, rows: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of a result's rows."""
        return await self._loop.run_in_executor(self._thread, self._logits, [hidden], rows)

    async def close(self) -> None:
        self._turning = True  # no turn starts any more
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _turn(self) -> None:
        """Take the next turn, if none goes on and something has arrived."""
        if self._turning or not self._arrived:
            return
        arrived, self._arrived = self._arrived, []
        self._turning = True
        if self._turn_s < self._short_s and all(item.answer.guesses_quickly for item in arrived):
            self._finish(arrived, *self._try(arrived))
            return

        def finish(turning: asyncio.Future[tuple[list[Turned] | Exception, float]]) -> None:
            if not turning.cancelled():
                self._finish(arrived, *turning.result())

        self._loop.run_in_executor(self._thread, self._try, arrived).add_done_callback(finish)

    def _try(self, arrived: list[Arrived]) -> tuple[list[Turned] | Exception, float]:
        started_s = self._now_s()
        try:
            outcome: list[Turned] | Exception = self._choose(arrived)
        except Exception as error:  # noqa: BLE001  whatever a kernel raises must reach the answers' readers
            outcome = error
        return outcome, self._now_s() - started_s

    def _finish(self, arrived: list[Arrived], outcome: list[Turned] | Exception, took_s: float) -> None:
        self._turning = False
        self._turn_s = took_s
        if isinstance(outcome, Exception):
            self._on_failed([item.answer for item in arrived], outcome)
        else:
            self._on_turned(outcome)
        self._loop.call_soon(self._turn)

    def _choose(self, arrived: list[Arrived]) -> list[Turned]:
        now_s = self._now_s()
        counts = [1 + len(item.answer.guesses) for item in arrived]
        logits_NV = self._logits([item.hidden for item in arrived], sum(counts))
        drawn: list[tuple[Answer, list[int]]] = []
        for item, logits_RV in zip(arrived, logits_NV.split_with_sizes(counts), strict=True):
            item.answer.turns_ms.append(((now_s - item.answer.sent_s) * 1e3, item.hops))
            try:
                drawn.append((item.answer, item.answer.draw(logits_RV)))
            except BsnsError as error:  # one route's bad numbers are not the other answers' trouble
                self._loop.call_soon_threadsafe(self._on_failed, [item.answer], error)
        running = [answer for answer, _ in drawn if answer.finished is None]
        drawn_s = self._now_s()
        for answer, tokens in drawn:
            if answer.finished is None:
                answer.guess(len(tokens) - 1, drawn_s)
        rows: dict[int, Buffer] = {}
        for codec in {answer.codec for answer in running}:
            members = [answer for answer in running if answer.codec == codec]
            rows |= zip(map(id, members), self._lines(members, codec), strict=True)
        sent_s = self._now_s()
        for answer in running:
            answer.sent_s = sent_s
        return [
            Turned(answer, tokens, answer.guesses, rows.get(id(answer)), answer.finished) for answer, tokens in drawn
        ]

    def _lines(self, answers: Sequence[Answer], codec: str) -> Iterator[Buffer]:
        """For each answer the activations of its newest token and its guesses."""
        lines = [answer.tokens[-1:] + answer.guesses for answer in answers]
        places = [len(a.tokens) - 1 + at for a, line in zip(answers, lines, strict=True) for at in range(len(line))]
        hidden = self._coded([token for line in lines for token in line], places, codec)
        row_bytes = memoryview(hidden).nbytes // len(places)
        start = 0
        for line in lines:
            end = start + len(line) * row_bytes
            yield hidden[start:end]
            start = end

    def _logits(self, pieces: Sequence[Buffer], rows: int) -> torch.Tensor:
        hidden = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._ends.logits(to_tensor(hidden, self._dtype, (rows, self._ends.hidden_size)))

    def _coded(self, tokens: Sequence[int], positions: Sequence[int], codec: str) -> Buffer:
        return encode(codec, to_memory(self._embed(tokens, positions)), self._dtype, self._ends.hidden_size)

    def _embed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return self._ends.embed(torch.tensor(tokens), torch.tensor(positions))
