"""The election, case by case: who claims when, who gives way to whom, who may act."""

from __future__ import annotations

import pytest

from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.swarm.election import Action, Claim, Election, Lease, Seen, Stand, StepDown, Stored

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
LEASE_S = 20.0
STEP_S = 1.0
NOW_S = 1000.0


def own_draw(peer: PeerId, term: int) -> bytes:
    """Lots in the order a, b, c for odd terms, c, b, a for even ones."""
    return bytes([term % 256, ord(peer) if term % 2 else 255 - ord(peer)])


def lot_of(peer: PeerId, term: int, drawn: bytes) -> bytes | None:
    return drawn[1:] if drawn[:1] == bytes([term % 256]) else None


def election(me: PeerId = A, *, stands: bool = True) -> Election:
    return Election(me, lambda term: own_draw(me, term), lot_of, lease_s=LEASE_S, stands=stands)


def draws(term: int, *peers: PeerId) -> dict[PeerId, bytes]:
    return {peer: own_draw(peer, term) for peer in peers}


def lease(holder: PeerId, term: int = 1, expires_s: float = NOW_S + LEASE_S) -> Lease:
    return Lease(holder, term, own_draw(holder, term)[1:], expires_s)


def claims(actions: list[Action]) -> list[Lease]:
    return [action.lease for action in actions if isinstance(action, Claim)]


def hold(one: Election, now_s: float = NOW_S, *peers: PeerId) -> Lease:
    """Let it claim, store and make sure of the lease; ends a step after `now_s`."""
    (claimed,) = claims(one.handle(Seen((), draws(1, A, *peers)), now_s))
    one.handle(Stored(claimed), now_s)
    one.handle(Seen((claimed,), draws(1, A, *peers)), now_s + STEP_S)
    assert one.acts(now_s + STEP_S)
    return claimed


def test_alone_it_claims_at_once_and_acts_a_step_later() -> None:
    one = election()
    first = one.handle(Seen((), {}), NOW_S)
    assert first == [Claim(lease(A)), Stand(1)]
    assert not one.acts(NOW_S)
    one.handle(Stored(lease(A)), NOW_S)
    assert not one.acts(NOW_S)
    assert one.wake_s == NOW_S + STEP_S
    assert one.handle(Seen((lease(A),), {}), NOW_S + STEP_S) == [Stand(2)]
    assert one.acts(NOW_S + STEP_S)
    one.check()


def test_whoever_is_no_member_of_the_election_only_watches() -> None:
    one = election(stands=False)
    assert one.handle(Seen((), {}), NOW_S) == []
    assert one.handle(Seen((lease(B),), draws(2, B)), NOW_S + 100) == []
    assert one.holder(NOW_S + 1) == lease(B) or one.holder(NOW_S + 1) is None


@pytest.mark.parametrize(("me", "turn"), [(A, 0), (B, 1), (C, 2)])
def test_ranks_claim_in_order(me: PeerId, turn: int) -> None:
    one = election(me)
    here = draws(1, A, B, C)
    seen = one.handle(Seen((), here), NOW_S)
    if turn:
        assert claims(seen) == []
        assert one.wake_s == NOW_S + turn * STEP_S
        assert claims(one.handle(Seen((), here), one.wake_s - 0.1)) == []
    assert [claimed.term for claimed in claims(one.handle(Seen((), here), NOW_S + turn * STEP_S))] == [1]


def test_a_draw_for_another_term_gives_no_rank() -> None:
    one = election(C)
    assert claims(one.handle(Seen((), draws(7, A, B)), NOW_S)) != []


def test_a_lease_is_renewed_every_third_of_its_time() -> None:
    one = election()
    hold(one)
    assert one.wake_s == pytest.approx(NOW_S + LEASE_S / 3)
    assert claims(one.handle(Seen((), {}), NOW_S + 5)) == []
    (renewed,) = claims(one.handle(Seen((), {}), NOW_S + 7))
    assert (renewed.term, renewed.expires_s) == (1, NOW_S + 7 + LEASE_S)
    one.handle(Stored(renewed), NOW_S + 7)
    assert one.acts(NOW_S + 7)
    assert one.acts(NOW_S + LEASE_S + 1)


def test_whoever_cannot_renew_stops_acting_and_comes_last() -> None:
    one = election()
    hold(one, NOW_S, B)
    for after_s in (7, 9, 19):  # claimed each time, never stored
        assert claims(one.handle(Seen((), draws(2, B)), NOW_S + after_s)) != []
    assert one.acts(NOW_S + LEASE_S - 0.1)
    assert not one.acts(NOW_S + LEASE_S)
    late = one.handle(Seen((), draws(2, B)), NOW_S + LEASE_S)
    assert StepDown(None) in late
    assert claims(late) == []  # B's lot is better for term 2; even if it were not, whoever let it lapse waits
    assert [claim.term for claim in claims(one.handle(Seen((), draws(2, B)), NOW_S + LEASE_S + 2 * STEP_S))] == [2]


@pytest.mark.parametrize(("other", "yields"), [(B, False), (PeerId("0"), True)])
def test_of_two_claims_of_a_term_the_better_lot_wins(other: PeerId, yields: bool) -> None:
    one = election()
    (mine,) = claims(one.handle(Seen((), {}), NOW_S))
    one.handle(Stored(mine), NOW_S)
    actions = one.handle(Seen((mine, lease(other)), draws(2, A, other)), NOW_S + STEP_S)
    assert (StepDown(other) in actions) == yields
    assert one.acts(NOW_S + STEP_S) != yields
    holder = one.holder(NOW_S + STEP_S)
    assert holder is not None
    assert holder.holder == (other if yields else A)
    one.check()


def test_a_later_term_beats_any_lot() -> None:
    one = election()
    mine = hold(one, NOW_S, C)
    actions = one.handle(Seen((mine, lease(C, 5)), draws(6, A, C)), NOW_S + 2)
    assert StepDown(C) in actions
    assert Stand(6) in actions
    assert not one.acts(NOW_S + 2)


def test_the_next_claims_when_the_lease_lapses_and_not_before() -> None:
    one = election(B)
    here = draws(2, A, B, C)
    held = lease(C, expires_s=NOW_S + 10)
    assert claims(one.handle(Seen((held,), here), NOW_S)) == []
    assert one.wake_s == NOW_S + LEASE_S / 3
    assert claims(one.handle(Seen((held,), here), NOW_S + 9)) == []
    assert one.wake_s == NOW_S + 10
    assert [claim.term for claim in claims(one.handle(Seen((), here), NOW_S + 10))] == [2]  # C, before B, has lapsed


def test_the_next_claims_at_once_when_the_holder_has_left() -> None:
    one = election(B)
    assert claims(one.handle(Seen((lease(C),), draws(2, A, B, C)), NOW_S)) == []
    assert [claim.term for claim in claims(one.handle(Seen((lease(C),), draws(2, A, B)), NOW_S + 1))] == [2]


def test_a_lease_that_one_reading_misses_is_still_good() -> None:
    one = election(B)
    one.handle(Seen((lease(C),), draws(2, A, B, C)), NOW_S)
    assert claims(one.handle(Seen((), draws(2, A, B, C)), NOW_S + 1)) == []
    assert one.holder(NOW_S + 1) == lease(C)


def test_a_lease_without_end_and_that_of_a_stranger_count_for_nothing() -> None:
    one = election()
    endless, strange = lease(B, expires_s=NOW_S + 3 * LEASE_S), lease(PeerId("0"))
    assert claims(one.handle(Seen((endless, strange), {B: b""}), NOW_S)) != []


def test_terms_do_not_outrun_the_clock() -> None:
    """Whoever claims the last number there is cannot end all elections."""
    one = election()
    lapsed = lease(B, term=1010, expires_s=NOW_S - 1)
    assert claims(one.handle(Seen((lapsed,), draws(1011, B)), NOW_S + 9)) == []
    assert [claim.term for claim in claims(one.handle(Seen((), {}), NOW_S + 11))] == [1011]


def test_whoever_cannot_hold_a_lease_does_not_move_the_term() -> None:
    """A member without a node, or with a lease that is too long, would keep everybody from claiming for ever."""
    one = election()
    stranger = lease(B, term=999, expires_s=NOW_S + 5)
    long = lease(C, term=999, expires_s=NOW_S + 1000)
    one.handle(Seen((stranger, long), draws(1, C)), NOW_S)
    claimed = claims(one.handle(Seen((stranger, long), draws(1, C)), NOW_S + 30))
    assert [claim.term for claim in claimed] == [1]


def test_an_impossible_lease() -> None:
    with pytest.raises(BadOption):
        Election(A, lambda term: b"", lot_of, lease_s=0.0, stands=True)


def test_a_lease_made_by_a_clock_far_ahead_is_given_up_once_the_clock_is_right() -> None:
    """Nobody else accepts it: its holder would act alone for an hour."""
    one = election()
    hold(one, NOW_S + 3600)
    actions = one.handle(Seen((), draws(2, A)), NOW_S)
    assert StepDown(None) in actions
    assert not one.acts(NOW_S)
    assert [claim.term for claim in claims(one.handle(Seen((), draws(2, A)), NOW_S + LEASE_S))] == [2]
    one.check()


def test_a_vacancy_seen_by_a_clock_far_ahead_is_no_reason_to_wait() -> None:
    one = election(C)
    here = draws(1, A, B, C)
    assert claims(one.handle(Seen((), here), NOW_S + 3600)) == []
    assert claims(one.handle(Seen((), here), NOW_S)) == []
    assert [claim.term for claim in claims(one.handle(Seen((), here), NOW_S + 2 * STEP_S))] == [1]
