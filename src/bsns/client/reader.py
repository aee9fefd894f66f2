"""Readers: whoever waits for what a session brings, and how far its tokens have come on their way."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from bsns.client.decoder import Answer, Arrived, Turned
from bsns.client.fault import Progress
from bsns.client.pace import Pace
from bsns.client.session import Session
from bsns.client.tracing import AnswerTrace
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId

CHUNK_ROWS = 128
"""Prompt tokens per step: small enough that stages work on different chunks at once, large enough to fill a product."""


class Awaited(NamedTuple):
    """A step [start, end) whose rows are wanted, and by what number it is told from those before."""

    start: int
    end: int
    turn: int

    @property
    def rows(self) -> int:
        return self.end - self.start


class Reader:
    """An answer's, which hears its turns, or without an answer a text's, which hears its steps' rows themselves."""

    def __init__(self, session: Session, tokens: Sequence[int], answer: Answer | None = None) -> None:
        self.session = session
        self.context = contextvars.copy_context()
        """That of the tasks that work for it, so that what they log names it, and the request it belongs to."""
        self.context.run(structlog.contextvars.bind_contextvars, session=str(session.id))
        self.tokens = list(tokens)
        """All of a text; of an answer those so far."""
        self.guesses: list[int] = []
        """What is sent along after the last of them, to be checked."""
        self.turns = 0
        """How often what is awaited has changed."""
        self.awaited: deque[Awaited] = deque()
        """What is to bring rows back, one after the other: an answer's newest token, or what is guessed to be it then,
        with the guesses that are sent in one step with it; the end of a text's chunk."""
        if answer is not None:
            self.awaited.append(Awaited(len(tokens) - 1, len(tokens), 0))
        self.came: deque[Arrived] = deque()
        """What the first of them have brought an answer, as long as the decoder has it or is yet to get it."""
        self.trailing: int | None = None
        """The turn of what is under way last, of what is not awaited any more."""
        self.answer = answer
        self.heard: asyncio.Queue[Turned | memoryview | BsnsError | None] = asyncio.Queue()
        self.sent = 0
        """How many tokens have been sent into the route as it is now."""
        self.through = 0
        """How many have come through all of it."""
        self.feeding = asyncio.Lock()
        self.lost: dict[PeerId, BsnsError] = {}
        """Stages of the route that have failed and are not replaced yet, and how."""
        self.former: set[PeerId] = set()
        """Stages that were replaced; what they still say is late."""
        self.early: dict[PeerId, BsnsError] = {}
        """Stages that failed before they were part of the route."""
        self.cause: BsnsError | None = None
        """The first failure since something came through last."""
        self.trouble: BsnsError | None = None
        """Why nothing comes through still."""
        self.setbacks = 0
        """Repairs begun since something came through last."""
        self.progress = Progress()
        self.pace = Pace([hop.says_ms for hop in session.route])
        self.deaf_since_s: float | None = None
        """Since when no stage has answered."""
        self.trace: AnswerTrace | None = None
        self.sent_s: dict[int, float] = {}
        """Where it is traced: when each chunk of its prompt was sent, by its end."""
        self.mending: asyncio.Task[None] | None = None
        self.looking: asyncio.Task[None] | None = None
        """Asks the stages, while a step is overdue."""

    def came_through(self, end: int) -> None:
        """So many tokens have come through all stages by now."""
        self.through = end
        self.cause = self.trouble = None
        self.setbacks = 0
        self.deaf_since_s = None
        self.progress.clear()

    @property
    def rests(self) -> bool:
        """Whether nothing is under way, and nothing is amiss."""
        return not (self.due or self.lost or self.mending or self.feeding.locked())

    @property
    def due(self) -> Awaited | None:
        """What is to bring its rows next."""
        return self.awaited[len(self.came)] if len(self.came) < len(self.awaited) else None

    def turn(self, tokens: Sequence[int], *, goes_on: bool) -> None:
        """An answer has new tokens. `goes_on`: all of them were guessed, and more is under way; otherwise what is under
        way is to be sent again."""
        self.tokens += tokens
        self.awaited.popleft()
        self.came.popleft()
        self.trailing = self.awaited[-1].turn if self.due is not None and not goes_on else None
        if goes_on:
            del self.guesses[: len(tokens)]
        else:
            for gone in (self.awaited, self.came, self.guesses):
                gone.clear()
        self.turns += 1
        self.came_through(len(self.tokens) - 1)
        if not goes_on:
            self.sent = min(self.sent, self.through)

    def expect(self, line: Sequence[int]) -> Awaited:
        """A further step of an answer is to bring rows: of the newest token, or what is guessed to be it, and more."""
        start = self.goal
        self.guesses += line if self.awaited else line[1:]
        self.turns += 1
        self.awaited.append(Awaited(start, start + len(line), self.turns))
        return self.awaited[-1]

    @property
    def goal(self) -> int:
        """How many tokens are to come through, guesses among them."""
        return self.awaited[-1].end if self.awaited else self.through

    def line(self, start: int, end: int) -> list[int]:
        """The tokens [start, end), and the guesses after them."""
        beyond = len(self.tokens)
        return self.tokens[start:end] + self.guesses[max(0, start - beyond) : max(0, end - beyond)]

    def next_step(self) -> tuple[int, int, int]:
        """Where the next step ends, how many rows of it are wanted, and its turn: at the end of a chunk, but rows that
        are wanted together are in one step."""
        for step in self.awaited:
            if self.sent < step.end <= self.sent + CHUNK_ROWS:
                return step.end, step.rows, step.turn
            if self.sent < step.end:
                return min(self.sent + CHUNK_ROWS, step.start), 0, step.turn
        return min(self.sent + CHUNK_ROWS, self.goal), 0, self.turns  # the answer has ended
