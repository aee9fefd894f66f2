"""What a worker has done so far, in figures that cost little to keep: whoever watches it reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bsns.worker.batching import Batch

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
SESSIONS = (1, 2, 4, 8, 16, 32, 64, 128)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Distribution:
    """How often values fell where: for each bound those that lie up to it and above the one before, and the rest."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """The values' sum."""

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tally:
    """From the worker's start. For the event loop's thread alone; times in seconds."""

    def __init__(self) -> None:
        self.steps = 0
        """Batches."""
        self.prefill_rows = self.decode_rows = 0
        """Rows of prompts, and of answers with the guesses along with them."""
        self.replay_rows = 0
        """Rows that were computed for a cache's sake alone: in a lost stage's place, or along as a spare."""
        self.batch_sessions = Distribution(SESSIONS)
        self.batch_rows = Distribution(ROWS)
        self.batch_s = Distribution(SECONDS)
        """Computing, of a batch."""
        self.hop_s = Distribution(SECONDS)
        """Of a session's step: from its arrival to its going on."""
        self.received_bytes: defaultdict[str, int] = defaultdict(int)
        self.sent_bytes: defaultdict[str, int] = defaultdict(int)
        """Of activations, by their codec."""
        self.refused: defaultdict[str, int] = defaultdict(int)
        """Sessions that were not admitted, by the error's code."""
        self.replays = 0
        """Journals sent to the end to a new next stage."""

    @property
    def rows(self) -> int:
        return self.prefill_rows + self.decode_rows + self.replay_rows

    def computed(self, batch: Batch, took_s: float) -> None:
        """Note a batch."""
        self.steps += 1
        rows = 0
        for work in batch.works:
            part = work.part
            own = part.rows
            rows += own
            if part.position + own <= work.session.passes_from:
                self.replay_rows += own
            elif part.turn:
                self.decode_rows += own
            else:
                self.prefill_rows += own
        self.batch_sessions.add(len(batch.works))
        self.batch_rows.add(rows)
        self.batch_s.add(took_s)
