"""What a client has done so far, in figures: whoever watches it reads them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """From the client's start, for the event loop's thread alone."""

    waiting: int = 0
    """Answers that have no session yet: they look for a route, or stand in line for room."""
    guesses: int = 0
    """Tokens that were sent along to be checked."""
    right: int = 0
    """Those of them that were right."""
    sent_bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    received_bytes: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Of activations, by their codec."""
