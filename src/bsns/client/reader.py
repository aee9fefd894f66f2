"""Readers: whoever waits for what a session brings, and how far its tokens have come on their way."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Sequence

import structlog

from bsns.client.decoder import Answer, Turned
from bsns.client.fault import Progress
from bsns.client.pace import Pace
from bsns.client.session import Session
from bsns.client.tracing import AnswerTrace
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId

CHUNK_ROWS = 128
"""Prompt tokens per step: small enough that stages work on different chunks at once, large enough to fill a product."""


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
        """How often there were new ones."""
        self.due = True
        """Whether the rows that are wanted have not come yet."""
        self.answer = answer
        self.heard: asyncio.Queue[Turned | memoryview | BsnsError | None] = asyncio.Queue()
        self.limit = 0 if answer is None else math.inf
        """How many of the tokens may be sent by now."""
        self.wanted = 1
        """How many rows the last of them, and the guesses, shall bring back."""
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
        return not (self.due or self.lost or self.mending or self.looking or self.feeding.locked())

    def turn(self, tokens: Sequence[int], guesses: list[int], *, ended: bool = False) -> None:
        """An answer has new tokens. What was sent of guesses that were wrong is to be sent again."""
        self.tokens += tokens
        self.guesses, self.wanted, self.due = guesses, 1 + len(guesses), not ended
        self.turns += 1
        self.came_through(len(self.tokens) - 1)
        self.sent = min(self.sent, self.through)

    @property
    def goal(self) -> int:
        """How many tokens are to come through, guesses among them."""
        return int(min(self.limit, len(self.tokens) + len(self.guesses)))

    def line(self, start: int, end: int) -> list[int]:
        """The tokens [start, end), and the guesses after them."""
        beyond = len(self.tokens)
        return self.tokens[start:end] + self.guesses[max(0, start - beyond) : max(0, end - beyond)]

    def next_end(self) -> int:
        """Where the next step may end: at the end of a chunk, but the rows that are wanted are in one step."""
        goal = self.goal
        end = min(self.sent + CHUNK_ROWS, goal)
        return end if end == goal else min(end, goal - self.wanted)
