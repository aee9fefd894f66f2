"""Faults: whose doing it is that a session's step is overdue, by how far it has come on each stage. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from bsns.core.errors import BsnsError, PeerSlow, PeerTimedOut, UnknownSession
from bsns.core.ids import PeerId
from bsns.protocol.inference import There

LATE_S = 0.3
"""Nobody is blamed who has stood still, or lacked something, for less."""
MOVING_S = 15.0
"""For so long a stage may lack what is seen to be on its way."""
SLOW_FACTOR = 10.0
SLOW_S = 1.0
"""A stage is slow that stands still, with a step to compute, for so many of the usual turns, and for so long; as often
as its node computes a batch meanwhile, one time more: others come first there."""
SLOW_AT_FIRST_S = 8.0
"""The same where nothing is usual yet: a long prompt on a slow machine takes its time."""
BUSY_S = 12.0
"""A stage that stands still for so long is slow, however much its node says to do for others."""


@dataclass(slots=True)
class _Seen:
    given: int
    done: int
    since_s: float
    taken: int
    """Of the bytes that it was sent."""
    batches: int
    """What its node had computed then."""
    lacks_since_s: float = math.inf
    """When it was first seen to lack what the one before has done."""


class Progress:
    """What is known of one session's progress on each of its stages since something came through last, or since its
    route is as it is."""

    def __init__(self) -> None:
        self._seen: dict[PeerId, _Seen] = {}

    def clear(self) -> None:
        """Something has come through, or the route is another."""
        self._seen.clear()

    def fault(
        self,
        span: tuple[int, int],
        onward: tuple[int, int],
        route: Sequence[PeerId],
        there: Mapping[PeerId, There],
        usual_s: float,
        now_s: float,
    ) -> tuple[PeerId, BsnsError] | None:
        """The first stage that is at fault, if one is by now. `span`: how many tokens have come through all of
        them, and how many the first has been sent; `onward` the bytes, as in There.

        What a stage has beyond what was sent are guesses that were wrong: it has not heard of those that came after.

        `usual_s`: what a turn takes otherwise, 0 where that is not known.
        """
        through, sent = span
        there = {peer: _without_wrong_guesses(now, through, sent) for peer, now in there.items()}
        still_s: dict[PeerId, float] = {}
        lacks_s: dict[PeerId, float] = {}
        """For how long a stage lacks what the one before has sent, where that is not on its way over a slow one."""
        before = sent
        for peer in route:
            seen, now = self._seen.get(peer), there[peer]
            if seen is None or (seen.given, seen.done) != (now.given, now.done):
                seen = self._seen[peer] = _Seen(
                    now.given, now.done, now_s, seen.taken if seen is not None else -1, now.batches
                )
            still_s[peer] = now_s - seen.since_s
            # not since it stands still: it may have waited for the one before, and what that sent be on its way
            seen.lacks_since_s = min(seen.lacks_since_s, now_s) if now.given < before else math.inf
            lacks_s[peer] = max(0.0, now_s - seen.lacks_since_s)
            if seen.taken < onward[1] < onward[0] and lacks_s[peer] < MOVING_S:
                lacks_s[peer] = 0.0
            seen.taken, onward, before = onward[1], now.onward, now.done
        slow_s = max(SLOW_S, SLOW_FACTOR * usual_s) if usual_s > 0 else SLOW_AT_FIRST_S
        before = sent
        for peer in route:
            now = there[peer]
            if now.given < 0:
                return peer, UnknownSession(f"node {peer} does not have the session any more")
            if lacks_s[peer] >= LATE_S:
                return peer, PeerTimedOut(f"node {peer} does not get what it is sent")
            times = 1 + max(0, now.batches - self._seen[peer].batches)
            if now.done < now.given and still_s[peer] >= max(slow_s, min(times * slow_s, BUSY_S)):
                return peer, PeerSlow(f"node {peer} has computed nothing for {still_s[peer]:.1f} s")
            before = now.done
        if before >= sent and min(still_s.values()) >= LATE_S:
            return route[-1], PeerTimedOut(f"node {route[-1]} has computed the step, but its answer does not come")
        return None


def _without_wrong_guesses(there: There, through: int, sent: int) -> There:
    given, done = (through if at > sent else at for at in (there.given, there.done))
    return msgspec.structs.replace(there, given=given, done=done) if there.given > sent or there.done > sent else there
