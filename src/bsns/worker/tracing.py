"""The port to whoever traces what a stage does for each session."""

from __future__ import annotations

from typing import Protocol

from bsns.core.ids import PeerId
from bsns.worker.batching import Batch, Work
from bsns.worker.sessions import Session


class StageTrace(Protocol):
    """One session's, from its opening or resuming to its end or parking. For the event loop's thread; times are of the
    worker's clock."""

    def step(self, batch: Batch, work: Work, finished_s: float) -> None:
        """A step of the session was computed in a batch."""
        ...

    def end(self) -> None: ...


class StageTracer(Protocol):
    """Traces sessions, as many at once as there are."""

    def begin(self, session: Session, client: PeerId, parent: str) -> StageTrace:
        """`parent`: the client's W3C traceparent, or whatever it wrote in its place."""
        ...
