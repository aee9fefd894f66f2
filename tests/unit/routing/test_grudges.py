"""For how long a peer that failed is passed over."""

from __future__ import annotations

from bsns.core.errors import CacheFull, NotHere, PeerLost
from bsns.core.ids import PeerId
from bsns.routing.grudges import FIRST_S, FORGIVEN_S, LONGEST_S, MOST_HELD, Grudges

A, B = PeerId("a"), PeerId("b")
LOST = PeerLost("gone")


def test_longer_each_time_up_to_a_limit_and_forgiven_in_the_end() -> None:
    grudges, now_s = Grudges(), 100.0
    spans = []
    for _ in range(9):
        grudges.blame(A, LOST, now_s)
        began_s = now_s
        while A in grudges.passed_over(now_s):
            now_s += 0.5
        spans.append(now_s - began_s)
    assert spans[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert spans[-1] == LONGEST_S
    now_s += FORGIVEN_S + 1
    grudges.blame(A, LOST, now_s)
    assert A not in grudges.passed_over(now_s + FIRST_S)


def test_one_failure_that_many_sessions_tell_of_counts_once() -> None:
    grudges = Grudges()
    for _ in range(50):
        grudges.blame(A, LOST, 0.0)
    assert grudges.passed_over(FIRST_S - 1) == {A}
    assert grudges.passed_over(FIRST_S) == set()


def test_a_full_node_has_not_failed() -> None:
    grudges = Grudges()
    grudges.blame(A, CacheFull("full"), 0.0)
    grudges.blame(B, NotHere("moved"), 0.0)
    assert grudges.passed_over(0.1) == set()


def test_the_oldest_are_forgotten_where_there_are_too_many() -> None:
    grudges = Grudges()
    peers = [PeerId(f"p{number}") for number in range(MOST_HELD)]
    for peer in peers:
        grudges.blame(peer, LOST, 0.0)
    grudges.blame(peers[0], LOST, FIRST_S)  # is the newest by that
    for peer in (A, B):
        grudges.blame(peer, LOST, FIRST_S)
    held = grudges.passed_over(FIRST_S)
    assert held == {A, B, peers[0]}
    assert grudges.passed_over(FIRST_S - 1) == {A, B, peers[0], *peers[3:]}
