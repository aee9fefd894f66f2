"""The port to whoever traces answers: told what each hop did, it makes spans of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from bsns.client.pieces import Stats
from bsns.protocol.inference import Passed
from bsns.routing.chain import Route

Hops = Sequence[Passed]
"""For each stage milliseconds inside the node, and of those computing: in its own words, which may be any numbers."""


class AnswerTrace(Protocol):
    """One answer's. For the event loop's thread; times are of the client's clock."""

    @property
    def parent(self) -> str:
        """The W3C traceparent under which stages may put spans of their own."""
        ...

    def prefilled(self, route: Route, rows: int, sent_s: float, hops: Hops) -> None:
        """A chunk of the prompt that was sent then has come through the route now."""
        ...

    def decoded(self, route: Route, rows: int, hops: Hops) -> None:
        """A step of the answer has come through now, guesses among its rows."""
        ...

    def end(self, stats: Stats, error: BaseException | None) -> None:
        """The answer is over; `error`: what ended it, if it was no last token. GeneratorExit: its reader went."""
        ...


class Tracer(Protocol):
    """Traces answers, as many at once as there are."""

    def begin(self) -> AnswerTrace: ...
