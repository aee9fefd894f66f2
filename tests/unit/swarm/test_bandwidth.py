"""Bandwidth from growing probes, over ways made of numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from bsns.protocol.probing import MAX_PROBE_BYTES
from bsns.swarm.bandwidth import FIRST_BYTES, FLOOR_S, MOST_S, Growth


def measured(round_trip_s: float, elapsed_s: Callable[[int, int], float]) -> tuple[Growth, list[int]]:
    """A measurement over a way where the n-th probe of some bytes takes `elapsed_s(bytes, n)`."""
    growth, sizes = Growth(round_trip_s), []
    for number in itertools.count():
        if (size := growth.size) is None:
            return growth, sizes
        sizes.append(size)
        growth.took(elapsed_s(size, number))
        assert number < 20
    raise AssertionError


@pytest.mark.parametrize("round_trip_s", [0.0002, 0.005, 0.3])
@pytest.mark.parametrize("bytes_per_s", [1e4, 1e5, 1e6, 12.5e6, 125e6, 1e9])
def test_a_steady_way_is_measured_exactly(round_trip_s: float, bytes_per_s: float) -> None:
    growth, sizes = measured(round_trip_s, lambda size, _: round_trip_s + size / bytes_per_s)
    assert growth.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-6)
    assert sizes == sorted(sizes)
    assert all(size / bytes_per_s <= MOST_S for size in sizes if size > FIRST_BYTES)
    assert growth.busy_s == pytest.approx(sum(max(size / bytes_per_s, FLOOR_S) for size in sizes))
    assert sum(sizes) < 1024 * 1024


def test_growth_goes_on_as_far_as_it_may() -> None:
    _, fast = measured(0.001, lambda size, _: 0.001 + size / 1e9)
    assert fast == [4096, 16384, 65536, 262144, 262144, 262144]
    _, slow = measured(0.001, lambda size, _: 0.001 + size / 1e5)
    assert slow == [4096, 4096, 4096]
    assert max(fast) == MAX_PROBE_BYTES


def test_a_hopeless_way_is_tried_once() -> None:
    growth, sizes = measured(0.1, lambda size, _: 0.1 + size / 2000)
    assert sizes == [4096]
    assert growth.bytes_per_s == pytest.approx(2000)


def test_what_is_too_quick_to_tell_counts_as_at_least_so_much() -> None:
    growth, _ = measured(0.002, lambda size, number: 0.002)
    assert growth.bytes_per_s == MAX_PROBE_BYTES / 20e-6


def test_pings_that_met_a_busy_node_are_corrected_by_the_first_probe() -> None:
    growth, _ = measured(0.050, lambda size, number: 0.001 + size / 1e7)
    assert growth.bytes_per_s == pytest.approx(1e7, rel=0.02)


def test_an_answer_late_by_accident_does_not_count() -> None:
    growth, _ = measured(0.001, lambda size, number: 0.001 + size / 1e7 + (0.04 if number in (0, 2, 5) else 0.0))
    assert growth.bytes_per_s == pytest.approx(1e7)


def test_slow_start_is_not_taken_for_a_slow_link() -> None:
    """An idle connection sends ten segments and then waits a round trip, twice as many each time (RFC 6928, 5681)."""
    window = 14600.0

    def tcp(size: int, _: int) -> float:
        nonlocal window
        left, turns = float(size), 1
        while left > window:
            left -= window
            window *= 2
            turns += 1
        return 0.05 * turns + size / 12.5e6

    growth, _ = measured(0.05, tcp)
    assert growth.bytes_per_s == pytest.approx(12.5e6, rel=0.05)
