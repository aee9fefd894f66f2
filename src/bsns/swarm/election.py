"""The election of a model's orchestrator: a draw by lot, and one lease that its holder renews. Pure.

For every term each node that stands has a lot, which anybody can check and nobody can choose (decision 0005). While
somebody holds the lease the others wait. When it lapses, or its holder is gone, they claim the next term in the order
of their lots, each a step later than the one before; the lots are known beforehand, so nothing has to be asked then.
Of two leases the one of the later term is good, of two of one term the one with the lesser lot; the other's holder
steps down when it sees that. A claim counts once a look at the directory, a step after it was stored, finds no better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bsns.core.errors import BadOption
from bsns.core.ids import PeerId

LEASE_S = 10.0
"""How long a lease is good unless it is renewed. All nodes of a swarm must have the same."""
RENEWALS = 3
"""How often a lease is renewed in its time, and how often everybody looks."""
STEPS = 20
"""How many ranks may claim, one after the other, in the time of one lease."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Whose turn it is, by which lot, until when (Unix time)."""

    holder: PeerId
    term: int
    lot: bytes
    expires_s: float

    def beats(self, other: Lease) -> bool:
        return (-self.term, self.lot, self.holder) < (-other.term, other.lot, other.holder)


@dataclass(frozen=True, slots=True)
class Seen:
    """The directory as it was read just now: leases that hold good in themselves, and the draws of who stands."""

    leases: Sequence[Lease]
    draws: Mapping[PeerId, bytes]
    """Of every node that is here and serves, b"" for those that do not stand."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Our lease is in the directory."""

    lease: Lease


Event = Seen | Stored


@dataclass(frozen=True, slots=True)
class Claim:
    """Put this lease in the directory, for the first time or with a later end; say `Stored` when it is there."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Stand:
    """Announce our draw for this term, so that all know our rank before they need it."""

    term: int


@dataclass(frozen=True, slots=True)
class StepDown:
    """We held the lease, or claimed it, and do no longer: `to` holds it, or nobody if ours has lapsed."""

    to: PeerId | None


Action = Claim | Stand | StepDown
LotOf = Callable[[PeerId, int, bytes], bytes | None]
"""The lot in a peer's draw for a term; None if it is not its draw for that."""


class Election:
    """One node's part in the election. Nothing is done here: whoever calls `handle` does the actions."""

    def __init__(
        self, me: PeerId, own_draw: Callable[[int], bytes], lot_of: LotOf, *, lease_s: float = LEASE_S, stands: bool
    ) -> None:
        """`own_draw` makes our draw for a term. A node that does not stand only learns who holds the lease."""
        if not 0 < lease_s < math.inf:
            raise BadOption(f"a lease of {lease_s} s is none")
        self._me = me
        self._own_draw = own_draw
        self._lot_of = lot_of
        self._stands = stands
        self.lease_s = lease_s
        self.step_s = lease_s / STEPS
        self.renew_s = lease_s / RENEWALS
        self.term = 0
        """The latest term anybody has claimed, as far as we know."""
        self._best: Lease | None = None
        self._mine: Lease | None = None
        self._last: Lease | None = None
        self._claimed_s = 0.0
        self._confirmed = False
        self._vacant_s: float | None = None
        self._stood: int | None = None
        self._wake_s = 0.0

    def holder(self, now_s: float) -> Lease | None:
        """The lease that is good now, as far as we know."""
        leases = [lease for lease in (self._best, self._mine) if lease is not None and now_s < lease.expires_s]
        return _best(leases)

    def acts(self, now_s: float) -> bool:
        """Whether we hold the lease for certain. It ends by itself unless it is renewed in time."""
        return self._confirmed and self._mine is not None and self.holder(now_s) == self._mine

    @property
    def wake_s(self) -> float:
        """When to look next, at the latest."""
        return self._wake_s

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do about an event."""
        match event:
            case Stored(lease):
                if self._mine is None or self._mine.term != lease.term:
                    self._claimed_s, self._confirmed = now_s, False
                self._mine = lease
                self.term = max(self.term, lease.term)
                due_s = lease.expires_s - self.lease_s + self.renew_s  # from when it was issued: storing takes time too
                self._wake_s = due_s if self._confirmed else min(due_s, self._claimed_s + self.step_s)
                return []
            case Seen():
                return self._look(event, now_s)

    def check(self) -> None:
        """Invariants: a lease of ours is of a term we know, and we are sure of it only while we have it."""
        assert self._mine is None or (self._mine.holder == self._me and self._mine.term <= self.term)
        assert not self._confirmed or self._mine is not None

    def _look(self, seen: Seen, now_s: float) -> list[Action]:
        actions: list[Action] = []
        # whoever has left has given up its lease; what we remember beyond a reading that missed it is good as well
        known = [*seen.leases] + ([self._best] if self._best is not None else [])
        others = [
            lease
            for lease in known
            if now_s < lease.expires_s <= now_s + 2 * self.lease_s
            and lease.holder in seen.draws
            and lease.holder != self._me
        ]
        before = _best([lease for lease in (self._best, self._mine, self._last) if lease is not None])
        self._last = before
        self._best = _best(others)
        # lapsed leases tell the term as well; those that nobody can hold do not: a member without a node, or with a
        # lease of any length, could keep the term at the clock's for ever
        soon_s = now_s + 2 * self.lease_s
        here = (lease for lease in seen.leases if lease.holder in seen.draws or lease.holder == self._me)
        terms = [lease.term for lease in here if lease.expires_s <= soon_s]
        self.term = max([self.term, *terms])
        actions += self._give_way(now_s)
        holder = self.holder(now_s)
        if holder is not None:
            self._vacant_s = None
            if holder == self._mine:
                actions += self._keep(now_s)
            else:
                self._wake_s = min(now_s + self.renew_s, holder.expires_s)
        else:
            if self._vacant_s is None or self._vacant_s > now_s:  # later than now: our clock was set back
                lapsed = before is not None and before.expires_s <= now_s
                self._vacant_s = before.expires_s if before is not None and lapsed else now_s
            actions += self._claim(seen, before, now_s)
        if self._stands and self._stood != self.term + 1:
            self._stood = self.term + 1
            actions.append(Stand(self.term + 1))
        return actions

    def _give_way(self, now_s: float) -> list[Action]:
        """Step down from a lease that has lapsed or that another's beats."""
        if self._mine is None:
            return []
        better = self._best is not None and self._best.beats(self._mine)
        # one that is good for longer than any lease was made while our clock was wrong, and nobody else accepts it
        if now_s < self._mine.expires_s <= now_s + 2 * self.lease_s and not better:
            return []
        self._mine, self._confirmed = None, False
        return [StepDown(self._best.holder if self._best is not None else None)]

    def _keep(self, now_s: float) -> list[Action]:
        """Be sure of our lease a step after it was stored, and renew it in time."""
        assert self._mine is not None
        if now_s >= self._claimed_s + self.step_s:
            self._confirmed = True
        due_s = self._mine.expires_s - self.lease_s + self.renew_s
        if now_s < due_s:
            self._wake_s = due_s if self._confirmed else min(due_s, self._claimed_s + self.step_s)
            return []
        self._wake_s = now_s + self.step_s  # should the renewal fail
        return [Claim(Lease(self._me, self._mine.term, self._mine.lot, now_s + self.lease_s))]

    def _claim(self, seen: Seen, before: Lease | None, now_s: float) -> list[Action]:
        """Claim the next term when it is our rank's turn."""
        assert self._vacant_s is not None
        if not self._stands:
            self._wake_s = now_s + self.renew_s
            return []
        term = self.term + 1
        mine = self._lot_of(self._me, term, self._own_draw(term))
        assert mine is not None, "our own draw must be good"
        last = before.holder if before is not None else None
        turn_s = self._vacant_s + self._rank(seen, term, mine, last) * self.step_s
        self._wake_s = min(turn_s, now_s + self.renew_s) if now_s < turn_s else now_s + self.step_s
        if now_s < turn_s or term > now_s:  # the directory takes no more terms than there have been seconds
            return []
        return [Claim(Lease(self._me, term, mine, now_s + self.lease_s))]

    def _rank(self, seen: Seen, term: int, mine: bytes, last: PeerId | None) -> int:
        """How many come before us: those of lesser lots that stand for this term, but whoever let the lease lapse."""
        lots = (self._lot_of(peer, term, drawn) for peer, drawn in seen.draws.items() if peer not in (self._me, last))
        before = sum(lot is not None and lot < mine for lot in lots)
        return before if last != self._me else before + 1


def _best(leases: Sequence[Lease]) -> Lease | None:
    best: Lease | None = None
    for lease in leases:
        if best is None or lease.beats(best) or (not best.beats(lease) and lease.expires_s > best.expires_s):
            best = lease
    return best
