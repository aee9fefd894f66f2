"""The decoder: turns activations into tokens and tokens into activations.

Whatever has arrived when it is free is done as one batch, a turn: one product with the head for all rows, a token for
each session, one look-up of all new tokens in the embedding. Turns that are short run on the event loop, for handing
them to a thread and back costs 0.1 ms a token; long ones (large vocabularies, many sessions) run on a thread.

When nothing has arrived it guesses further ahead: a step that goes on from guesses which are still being checked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

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
from bsns.protocol.inference import MAX_UNDER_WAY, Passed
from bsns.transport.clock import MACHINE_CLOCK, Clock

RIGHT_AFTER = 0.25
"""A step was sent right after another if that was in no more than this of the time in which it came after it."""


@dataclass(slots=True)
class Line:
    """The tokens of a step that brings back all their rows: the newest or what is guessed to be it, and guesses."""

    tokens: list[int]
    sent_s: float = 0.0
    follows_s: float | None = None
    """When the one before it was sent, if that was under way then."""


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
    under_way: deque[Line] = field(default_factory=deque)
    """What has been sent and has not come back, the prompt's end at first; each goes on from the one before, as if all
    its guesses were right."""
    finished: str | None = None
    """`stop` or `length` once the last token is chosen."""
    sent_s: float = 0.0
    """When the prompt was."""
    drawn_s: float = 0.0
    """When its latest tokens were drawn."""
    turns_ms: list[tuple[float, tuple[Passed, ...]]] = field(default_factory=list)
    """Per step: milliseconds from leaving this thread to its result arriving here, and its hops."""
    constraint: Constraint | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    """Per token of the answer, if its options ask for them."""

    def __post_init__(self) -> None:
        self.under_way.append(Line(self.tokens[-1:], self.sent_s))

    @property
    def guesses_quickly(self) -> bool:
        return self.guesser is None or self.guesser.quick

    @property
    def room(self) -> int:
        """How many more tokens may be guessed: each brings one after it."""
        ahead = sum(len(line.tokens) for line in self.under_way) or 1
        return self.prompt_tokens + self.max_tokens - len(self.tokens) - ahead

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

    def draw(self, logits_RV: torch.Tensor, hops: tuple[Passed, ...], came_s: float, now_s: float) -> list[int]:
        """Take the next tokens: one, and one more for each guess that was right. `logits_RV`: of the first line that is
        under way, which came back at `came_s`. Where one of its guesses was wrong nothing is under way any more."""
        line = self.under_way.popleft()
        self.turns_ms.append(((came_s - line.sent_s) * 1e3, hops))
        guesses = line.tokens[1:] + [further.tokens[0] for further in self.under_way][:1]
        drawn: list[int] = []
        for guess, logits_V in zip([*guesses, None], logits_RV, strict=False):  # one more may be guessed than is drawn
            drawn.append(self.choose(logits_V))
            if self.finished is not None or drawn[-1] != guess:
                break
        right = len(drawn) - (drawn[-1] != guess)
        if self.finished is not None or right < len(guesses):
            self.under_way.clear()
        if self.guesser is not None and len(self.turns_ms) > 1:  # the first is the prompt's
            self.guesser.checked(len(guesses), right)
            behind_s = now_s - self.drawn_s
            if line.follows_s is None:
                computing_s = [hop.computing_ms / 1e3 for hop in hops]
                self.guesser.took(len(line.tokens), now_s - line.sent_s, computing_s)
            elif line.sent_s - line.follows_s < RIGHT_AFTER * behind_s:
                self.guesser.took_further(len(line.tokens), behind_s)
        self.drawn_s = now_s
        return drawn

    def begin(self) -> Line:
        """The next line, where none is under way: the newest token, and guesses at what follows."""
        guesses = self.guesser.guess(self.tokens, self.room) if self.guesser is not None else []
        self.under_way.append(Line([self.tokens[-1], *guesses]))
        return self.under_way[-1]

    @property
    def may_go_on(self) -> bool:
        """Whether guesses are under way, and there is room for more after them."""
        under_way = self.under_way
        return len(under_way) < MAX_UNDER_WAY and self.room > 0 and sum(len(line.tokens) for line in under_way) > 1

    def go_on(self) -> Line | None:
        """A further line, to be checked right after those that are under way, if one is worth it."""
        if self.guesser is None or not self.may_go_on:
            return None
        ahead = [token for line in self.under_way for token in line.tokens][1:]
        guesses = self.guesser.go_on(self.tokens, ahead, self.room)
        if not guesses:
            return None
        self.under_way.append(Line(guesses, follows_s=self.under_way[-1].sent_s))
        return self.under_way[-1]

    @property
    def last_places(self) -> range:
        """The positions of the line that is last under way."""
        end = len(self.tokens) - 1 + sum(len(line.tokens) for line in self.under_way)
        return range(end - len(self.under_way[-1].tokens), end)


@dataclass(slots=True)
class Arrived:
    """The last stage's rows for an answer's newest token and the guesses after it."""

    answer: Answer
    hidden: Buffer
    hops: tuple[Passed, ...] = ()


@dataclass(slots=True)
class Turned:
    """What a turn gives one answer."""

    answer: Answer
    tokens: list[int]
    """Its next ones; none where it only guesses further ahead."""
    line: list[int]
    """What is to be sent now, if anything: the last of them and guesses, or further guesses."""
    hidden: Buffer | None
    """Its activations, in the answer's codec."""
    goes_on: bool
    """Whether what is under way goes on from the tokens."""
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
        self._may_go_on: dict[SessionId, Answer] = {}
        """Those with something under way, whose guesser has not been asked what comes after that."""
        self._turning = self._closed = False
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

    def forget(self, session: SessionId) -> None:
        """No further guesses are wanted for its answer."""
        self._may_go_on.pop(session, None)

    async def close(self) -> None:
        self._closed = True  # no turn starts any more
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _turn(self) -> None:
        """Take the next turn, if none goes on and something has arrived, or else an answer may guess further ahead."""
        if self._turning or self._closed or not (self._arrived or self._may_go_on):
            return
        arrived, self._arrived = self._arrived, []
        if arrived:
            answers = [item.answer for item in arrived]
            turn = partial(self._choose, arrived)
        else:
            answers, self._may_go_on = list(self._may_go_on.values()), {}
            turn = partial(self._go_on, answers)
        self._turning = True
        if self._turn_s < self._short_s and all(answer.guesses_quickly for answer in answers):
            self._finish(answers, *self._try(turn))
            return

        def finish(turning: asyncio.Future[tuple[list[Turned] | Exception, float]]) -> None:
            if not turning.cancelled():
                self._finish(answers, *turning.result())

        self._loop.run_in_executor(self._thread, self._try, turn).add_done_callback(finish)

    def _try(self, turn: Callable[[], list[Turned]]) -> tuple[list[Turned] | Exception, float]:
        started_s = self._now_s()
        try:
            outcome: list[Turned] | Exception = turn()
        except Exception as error:  # noqa: BLE001  whatever a kernel raises must reach the answers' readers
            outcome = error
        return outcome, self._now_s() - started_s

    def _finish(self, answers: list[Answer], outcome: list[Turned] | Exception, took_s: float) -> None:
        self._turning = False
        if isinstance(outcome, Exception):
            self._on_failed(answers, outcome)
        else:
            if any(item.tokens for item in outcome):
                self._turn_s = took_s
                for answer in answers:
                    if answer.may_go_on:
                        self._may_go_on[answer.session] = answer
                    else:
                        self.forget(answer.session)
            self._on_turned(outcome)
        self._loop.call_soon(self._turn)

    def _choose(self, arrived: list[Arrived]) -> list[Turned]:
        came_s = self._now_s()
        counts = [len(item.answer.under_way[0].tokens) for item in arrived]
        logits_NV = self._logits([item.hidden for item in arrived], sum(counts))
        drawn: list[tuple[Answer, list[int]]] = []
        for item, logits_RV in zip(arrived, logits_NV.split_with_sizes(counts), strict=True):
            try:
                drawn.append((item.answer, item.answer.draw(logits_RV, item.hops, came_s, self._now_s())))
            except BsnsError as error:  # one route's bad numbers are not the other answers' trouble
                self._loop.call_soon_threadsafe(self._on_failed, [item.answer], error)
        goes_on = [bool(answer.under_way) for answer, _ in drawn]
        begun = [
            (answer, answer.begin())
            for (answer, _), on in zip(drawn, goes_on, strict=True)
            if not on and answer.finished is None
        ]
        rows = self._activations(begun)
        lines = {id(answer): line.tokens for answer, line in begun}
        return [
            Turned(answer, tokens, lines.get(id(answer), []), rows.get(id(answer)), on, answer.finished)
            for (answer, tokens), on in zip(drawn, goes_on, strict=True)
        ]

    def _go_on(self, answers: list[Answer]) -> list[Turned]:
        turned: list[Turned] = []
        while answers:  # each further line goes on from the one before
            further = [(answer, line) for answer in answers if (line := answer.go_on()) is not None]
            answers = [answer for answer, _ in further]
            rows = self._activations(further)
            turned += [
                Turned(answer, [], line.tokens, rows[id(answer)], goes_on=True, finished=None)
                for answer, line in further
            ]
        return turned

    def _activations(self, lines: Sequence[tuple[Answer, Line]]) -> dict[int, Buffer]:
        """Those of the line that is last under way in each of these answers, in its codec; by the answer's id. They are
        sent now."""
        rows: dict[int, Buffer] = {}
        for codec in {answer.codec for answer, _ in lines}:
            members = [(answer, line) for answer, line in lines if answer.codec == codec]
            tokens = [token for _, line in members for token in line.tokens]
            places = [place for answer, _ in members for place in answer.last_places]
            hidden = self._coded(tokens, places, codec)
            row_bytes = memoryview(hidden).nbytes // len(places)
            start = 0
            for answer, line in members:
                end = start + len(line.tokens) * row_bytes
                rows[id(answer)] = hidden[start:end]
                start = end
        sent_s = self._now_s()
        for _, line in lines:
            line.sent_s = sent_s
        return rows

    def _logits(self, pieces: Sequence[Buffer], rows: int) -> torch.Tensor:
        hidden = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._ends.logits(to_tensor(hidden, self._dtype, (rows, self._ends.hidden_size)))

    def _coded(self, tokens: Sequence[int], positions: Sequence[int], codec: str) -> Buffer:
        return encode(codec, to_memory(self._embed(tokens, positions)), self._dtype, self._ends.hidden_size)

    def _embed(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        return self._ends.embed(torch.tensor(tokens), torch.tensor(positions))
