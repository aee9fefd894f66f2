"""The line: who waits for room in a stage's cache, and in what order they get it. Pure: time comes in as an argument.

Without it, room goes to whoever asks at the right moment: to a client that asks anew as soon as one of its own answers
has ended, each time before those that have waited all along.
"""

from __future__ import annotations

from dataclasses import dataclass

from bsns.core.ids import PeerId, SessionId

WAITS_S = 2.0
"""Whoever has not asked again for so long waits no more."""
MOST_WAITING = 1024
"""Beyond this nobody is noted: whoever comes in many shapes shall not fill our memory."""


@dataclass(slots=True)
class _Waiting:
    since_s: float
    tokens: int
    asked_s: float
    session: SessionId
    """The one for which it asked last."""
    here: bool = True
    """Else it waits elsewhere, and keeps no room."""


class Line:
    """Clients that were refused, in the order in which they first were. One that gets room goes to the end for more:
    so clients take turns, however many answers each wants at once. One that gives the room back unused, for another
    stage had none, comes where it was."""

    def __init__(self) -> None:
        self._waiting: dict[PeerId, _Waiting] = {}

    def __len__(self) -> int:
        return sum(held.here for held in self._waiting.values())

    def ahead_of(self, client: PeerId, now_s: float) -> tuple[int, int]:
        """How many clients come before this one, and how many tokens they want together."""
        self._waiting = {peer: held for peer, held in self._waiting.items() if now_s - held.asked_s <= WAITS_S}
        own = self._waiting.get(client)
        here = [held for held in self._waiting.values() if held.here]
        ahead = [held for held in here if own is None or held.since_s < own.since_s]
        return len(ahead), sum(held.tokens for held in ahead)

    def join(self, client: PeerId, session: SessionId, tokens: int, now_s: float, since_s: float | None = None) -> None:
        """A client was refused, or (`since_s`) gives back unused what it had waited for since then. If it waits
        already, it keeps its place, or the better of the two."""
        known = self._waiting.get(client)
        if known is not None:
            known.tokens, known.asked_s, known.here = tokens, max(known.asked_s, now_s), True
            if since_s is None:
                known.session = session
            else:
                known.since_s = min(known.since_s, since_s)
        elif len(self._waiting) < MOST_WAITING:
            self._waiting[client] = _Waiting(now_s if since_s is None else since_s, tokens, now_s, session)

    def give_up(self, client: PeerId, session: SessionId) -> None:
        """A client waits elsewhere: it keeps no room from others, but its place, if it is back before that is lost.
        Where it has asked for another session since, it waits on."""
        held = self._waiting.get(client)
        if held is not None and held.session == session:
            held.here = False

    def leave(self, client: PeerId) -> float | None:
        """A client got room, or is gone; since when it has waited, if it has."""
        held = self._waiting.pop(client, None)
        return held.since_s if held is not None else None
