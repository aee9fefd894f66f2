"""Continuous batching: which steps run together, and when. Pure: time comes in as an argument.

Every batch takes the step that has waited longest, the waiting short steps (decoding), and then as many prompt chunks
as fit: where sessions are decoding, no more than a single one, so that prompts delay nobody by more than that, however
many there are, and nobody starves. A session is in a batch at most once, in order.

On a route of several stages the batch is cut so that every stage has one: if all sessions stepped in one batch, one
stage would work while the others wait. With S sessions stepping through D stages that can compute at once a batch takes
at most ⌈S / D⌉ of them. Stages that share a machine wait for one another anyhow, and gain by larger batches.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import Part
from bsns.worker.sessions import Session

SHORT_ROWS = 16
"""Steps up to this many rows count as decoding."""
ACTIVE_S = 1.0
"""A session that stepped within this time counts as stepping."""


@dataclass(slots=True)
class Work:
    """One session's step, waiting or running."""

    session: Session
    part: Part
    hidden: Buffer
    """The rows' bytes."""
    arrived_s: float
    started_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Steps that run as one, all through the same blocks of the same range that the node holds."""

    blocks: BlockRange
    works: Sequence[Work]

    @property
    def rows(self) -> int:
        return sum(work.part.rows for work in self.works)


class Batcher:
    """The waiting steps of a stage, a queue per session."""

    def __init__(self, *, max_rows: int = 512) -> None:
        self.max_rows = max_rows
        self._queues: dict[SessionId, deque[Work]] = {}
        self._stepped: OrderedDict[SessionId, float] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def overwritten(self, part: Part) -> int:
        """How many of the rows that wait a step would make needless: those of its session from its place on."""
        queue = self._queues.get(part.session, ())
        return sum(work.part.rows for work in queue if work.part.position >= part.position)

    def add(self, work: Work) -> None:
        """Let a step wait, in place of those that it overwrites: guesses that have been wrong, say."""
        id_ = work.part.session
        queue = self._queues.setdefault(id_, deque())
        while queue and queue[-1].part.position >= work.part.position:
            work.session.waiting -= queue.pop().part.rows
        queue.append(work)
        work.session.waiting += work.part.rows
        if work.part.rows <= SHORT_ROWS:
            self._stepped[id_] = work.arrived_s
            self._stepped.move_to_end(id_)

    def drop(self, session: SessionId) -> None:
        """Forget a session's waiting steps."""
        for work in self._queues.pop(session, ()):
            work.session.waiting -= work.part.rows
        self._stepped.pop(session, None)

    def next_batch(self, now_s: float) -> Batch | None:
        """Take the next batch, or None if nothing waits. The longest waiting step decides which blocks run."""
        if not self._queues:
            return None
        heads = sorted((queue[0] for queue in self._queues.values()), key=lambda work: work.arrived_s)
        blocks, held = heads[0].session.blocks, heads[0].session.held
        fitting = [work for work in heads if work.session.blocks == blocks and work.session.held == held]
        short = [work for work in fitting if work.part.rows <= SHORT_ROWS][: self._short_steps(fitting, now_s)]
        long = [work for work in fitting if work.part.rows > SHORT_ROWS]
        chosen: list[Work] = []
        rows = 0
        oldest = [] if heads[0] in short else [heads[0]]
        later = [work for work in long if work is not heads[0]]
        if self._stepped:
            later = later[: 1 - len(oldest)]
        for work in (*oldest, *short, *later):
            if chosen and rows + work.part.rows > self.max_rows:
                continue
            chosen.append(self._take(work.part.session))
            work.started_s = now_s
            rows += work.part.rows
        return Batch(blocks, chosen)

    def _take(self, session: SessionId) -> Work:
        queue = self._queues[session]
        work = queue.popleft()
        work.session.waiting -= work.part.rows
        if not queue:
            del self._queues[session]
        return work

    def _short_steps(self, fitting: Sequence[Work], now_s: float) -> int:
        """How many short steps a batch may take, so that every stage of the routes has work."""
        while self._stepped and now_s - next(iter(self._stepped.values())) > ACTIVE_S:
            self._stepped.popitem(last=False)
        at_once = max(work.session.at_once for work in fitting)
        return max(1, -(-len(self._stepped) // at_once))
