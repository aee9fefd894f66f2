"""Estimates of links, and the schedule by which they are measured, in numbers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from bsns.core.ids import PeerId
from bsns.core.snapshot import Link
from bsns.protocol.records import LinkRecord
from bsns.swarm.probing import (
    BANDWIDTH_S,
    MAX_BACK_OFF_S,
    REFRESH_S,
    ROTATE_S,
    LinkEstimator,
    differ,
    link_records,
    next_probes,
    watched,
)
from bsns.swarm.records import MAX_LINKS


def peers_of(count: int) -> list[PeerId]:
    return [PeerId(f"p{number:03}") for number in range(count)]


def estimator(*rounds: float, bytes_per_s: float | None = 1e6) -> LinkEstimator:
    """One whose n-th round was at n seconds, all its pings alike."""
    found = LinkEstimator(0.0)
    for second, ping_s in enumerate(rounds):
        found.answered([ping_s] * 5, bytes_per_s, float(second))
    return found


def test_nothing_is_known_before_the_first_answer() -> None:
    found = LinkEstimator(0.0)
    assert found.link(5.0) is None
    assert found.due_s <= 0
    assert found.wants_bandwidth(0.0)
    found.silent(1.0)
    assert found.link(5.0) is None


def test_median_spread_and_age() -> None:
    found = LinkEstimator(0.0)
    found.answered([0.010, 0.012, 0.011, 0.5, 0.6], 1e6, 1.0)
    found.answered([0.013, 0.011, 0.010, 0.7, 0.8], 3e6, 2.0)
    found.answered([0.012], None, 3.0)
    link = found.link(10.0)
    assert link is not None
    assert link.round_trip_s == 0.011
    assert link.spread_s == pytest.approx(0.001)
    assert link.bytes_per_s == 2e6
    assert link.age_s == 7.0


def test_a_bandwidth_that_was_not_measured_is_infinite() -> None:
    assert estimator(0.01, bytes_per_s=None).link(0.0) == Link(0.01)


@pytest.mark.parametrize("bad", [[3], [3, 6], [2, 4, 6]])
def test_single_bad_rounds_change_nothing(bad: list[int]) -> None:
    found = estimator(*(0.5 if number in bad else 0.010 for number in range(8)))
    link = found.link(8.0)
    assert link is not None
    assert (link.round_trip_s, link.spread_s) == (0.010, 0.0)


@pytest.mark.parametrize(("before", "after"), [(0.010, 0.080), (0.080, 0.010)])
def test_two_rounds_that_agree_are_the_new_truth(before: float, after: float) -> None:
    link = estimator(*[before] * 8, after).link(9.0)
    assert link is not None
    assert link.round_trip_s == before
    link = estimator(*[before] * 8, after, after).link(10.0)
    assert link is not None
    assert link.round_trip_s == after


def test_a_bandwidth_follows_within_three_rounds() -> None:
    found = estimator(*[0.01] * 5, bytes_per_s=1e6)
    for second in range(5, 8):
        found.answered([0.01], 1e5, float(second))
    link = found.link(8.0)
    assert link is not None
    assert link.bytes_per_s == 1e5


def test_memory_is_bounded() -> None:
    found = estimator(*([0.01, 0.02] * 500))
    assert len(found._rounds) <= 8
    assert len(found._bytes_per_s) <= 5


def test_rounds_become_rarer_and_bandwidths_rarer_still() -> None:
    found = estimator(0.01)
    assert found.due_s == pytest.approx(3.0)
    found = estimator(0.01, 0.01, 0.01)
    assert found.due_s == pytest.approx(2.0 + REFRESH_S)
    assert not found.wants_bandwidth(10.0)
    assert found.wants_bandwidth(2.0 + BANDWIDTH_S)


def test_who_does_not_answer_is_left_alone_ever_longer() -> None:
    found = estimator(0.01, 0.01, 0.01)
    waits = []
    for _ in range(10):
        found.silent(100.0)
        waits.append(found.due_s - 100.0)
    assert waits[:5] == [2, 4, 8, 16, 32]
    assert waits[-1] == MAX_BACK_OFF_S
    link = found.link(100.0)
    assert link is not None
    assert link.age_s == 98.0
    found.answered([0.01], None, 101.0)
    assert found.failures == 0


def test_strangers_first_then_who_is_longest_due() -> None:
    a, b, c, d, e = peers_of(5)
    estimates = {a: estimator(0.01), b: estimator(0.01, 0.01), c: estimator(0.01)}
    estimates[c].silent(3.0)
    rng = np.random.default_rng(0)
    due = next_probes(4.5, [a, b, c, d, e], estimates, rng, neighbours=[e])
    assert due == [e, d, a, b]  # c is backing off until 5
    assert next_probes(5.0, [c], estimates, rng) == [c]
    assert next_probes(0.5, [a], estimates, rng) == []
    assert next_probes(1.0, [], {}, rng) == []


def test_in_a_small_swarm_everybody_is_measured() -> None:
    assert watched(0.0, peers_of(MAX_LINKS), {}, np.random.default_rng(0)) == peers_of(MAX_LINKS)


def run(seconds: int, trips_s: dict[PeerId, float], neighbours: list[PeerId], silent: frozenset[PeerId] = frozenset()):  # type: ignore[no-untyped-def]
    """A prober's life, one visit a second; the estimates at its end and how often each peer was visited."""
    rng = np.random.default_rng(3)
    estimates: dict[PeerId, LinkEstimator] = {}
    visits: Counter[PeerId] = Counter()
    for second in range(seconds):
        now_s = float(second)
        kept = set(watched(now_s, trips_s.keys(), estimates, rng, neighbours))
        assert len(kept) <= MAX_LINKS
        estimates = {peer: estimate for peer, estimate in estimates.items() if peer in kept}
        due = next_probes(now_s, trips_s.keys(), estimates, rng, neighbours)
        if due:
            visits[due[0]] += 1
            estimate = estimates.setdefault(due[0], LinkEstimator(now_s))
            if due[0] in silent:
                estimate.silent(now_s)
            else:
                estimate.answered([trips_s[due[0]]], 1e6, now_s)
    return estimates, visits


def test_in_a_large_swarm_a_bounded_number_among_them_the_neighbours_and_ever_nearer_ones() -> None:
    trips_s = {peer: 0.001 * (1 + number) for number, peer in enumerate(peers_of(200))}
    neighbours = peers_of(200)[150:153]
    estimates, visits = run(3600, trips_s, neighbours)
    assert len(estimates) <= MAX_LINKS
    assert set(neighbours) <= estimates.keys()
    assert len(visits) > 100  # lots fall on most in an hour
    nearest = sorted(trips_s[peer] for peer in estimates)[: MAX_LINKS // 3]
    assert max(nearest) <= 0.020
    ages = [link.age_s for estimate in estimates.values() if (link := estimate.link(3600.0)) is not None]
    assert max(ages) < 60


def test_who_never_answers_keeps_no_place_that_was_drawn() -> None:
    trips_s = dict.fromkeys(peers_of(100), 0.01)
    silent = frozenset(peers_of(100)[::2])
    estimates, _ = run(int(2 * ROTATE_S), trips_s, [], silent)
    assert sum(peer in silent for peer in estimates) <= MAX_LINKS // 3


def test_records_put_neighbours_first_and_then_the_nearest() -> None:
    a, b, c, d = peers_of(4)
    estimates = {a: estimator(0.03), b: estimator(0.01), c: estimator(0.02), d: LinkEstimator(0.0)}
    links = link_records(10.0, 1000.0, estimates, neighbours=[c])
    assert links == tuple(
        LinkRecord(peer, trip_s, 0.0, 1e6, 990.0) for peer, trip_s in [(c, 0.02), (b, 0.01), (a, 0.03)]
    )
    many = {peer: estimator(0.01) for peer in peers_of(40)}
    assert len(link_records(0.0, 0.0, many)) == MAX_LINKS


@pytest.mark.parametrize(
    ("now", "news"),
    [
        (LinkRecord(PeerId("a"), 0.100, 0.001, 1e6, 500.0), False),
        (LinkRecord(PeerId("a"), 0.110, 0.004, 1.5e6, 500.0), False),
        (LinkRecord(PeerId("a"), 0.140, 0.001, 1e6, 500.0), True),
        (LinkRecord(PeerId("a"), 0.060, 0.001, 1e6, 500.0), True),
        (LinkRecord(PeerId("a"), 0.100, 0.001, 3e6, 500.0), True),
        (LinkRecord(PeerId("a"), 0.100, 0.001, 1e5, 500.0), True),
        (LinkRecord(PeerId("a"), 0.100, 0.001, math.inf, 500.0), True),
        (LinkRecord(PeerId("b"), 0.100, 0.001, 1e6, 500.0), True),
    ],
)
def test_what_is_worth_publishing(now: LinkRecord, news: bool) -> None:
    before = (LinkRecord(PeerId("a"), 0.100, 0.001, 1e6, 0.0),)
    assert differ(before, (now,)) is news
    assert differ((), (now,))
    assert not differ((now,), (now,))
