"""Allowances: what may be spent when, and what a flood of probes gets."""

from __future__ import annotations

import pytest

from bsns.core.errors import BadFrame
from bsns.core.ids import PeerId
from bsns.swarm import allowances
from bsns.swarm.allowances import (
    ALL_BURST_BYTES,
    LEAST_BYTES,
    MAX_PEERS,
    MAX_REFUSALS,
    PEER_BURST_BYTES,
    PEER_BYTES_PER_S,
    Allowance,
    ProbeLimiter,
)

A, B = PeerId("a"), PeerId("b")
KIB = 1024


def test_a_bucket_leaks() -> None:
    bucket = Allowance(10.0, 100.0)
    assert bucket.wait_s(100, 0.0) == 0
    bucket.spend(100, 0.0)
    assert bucket.wait_s(50, 0.0) == 5.0
    assert bucket.wait_s(50, 5.0) == 0
    assert bucket.wait_s(1000, 5.0) == 5.0  # more than it ever holds: once it is empty
    bucket.spend(500, 10.0)
    assert bucket.wait_s(0, 10.0) == 40.0
    assert not bucket.idle(59.0)
    assert bucket.idle(60.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Allowance(10.0, 100.0)
    bucket.spend(100, 5.0)
    assert bucket.wait_s(10, 1.0) == 1.0


def test_one_peer_cannot_use_up_what_others_may() -> None:
    limiter = ProbeLimiter()
    while limiter.wait_s(A, 256 * KIB, 0.0) == 0:
        pass
    assert limiter.wait_s(B, 256 * KIB, 0.0) == 0


def test_all_peers_together_are_bounded() -> None:
    limiter = ProbeLimiter()
    taken = sum(limiter.wait_s(PeerId(f"{n}"), 256 * KIB, 0.0) == 0 for n in range(500))
    assert taken * 256 * KIB == ALL_BURST_BYTES


@pytest.mark.parametrize("size", [0, 64, LEAST_BYTES, 256 * KIB])
def test_a_flood_gets_no_more_than_its_share_and_is_cut_off(size: int) -> None:
    limiter, taken, refused, cut_off = ProbeLimiter(), 0, 0, 0
    for n in range(100_000):
        try:
            wait_s = limiter.wait_s(A, size, n / 10_000)
        except BadFrame:
            cut_off += 1
        else:
            taken += max(size, LEAST_BYTES) * (wait_s == 0)
            refused += wait_s > 0
    assert taken <= PEER_BURST_BYTES + 10 * PEER_BYTES_PER_S
    assert MAX_REFUSALS <= refused <= MAX_REFUSALS + 11
    assert cut_off > 90_000


def test_who_waits_as_told_is_taken() -> None:
    limiter, now_s = ProbeLimiter(), 0.0
    for _ in range(1000):
        wait_s = limiter.wait_s(A, 256 * KIB, now_s)
        now_s += wait_s
        assert wait_s == 0 or limiter.wait_s(A, 256 * KIB, now_s) < 1e-6


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowances, "MAX_PEERS", 100)
    limiter = ProbeLimiter()
    for n in range(10_000):
        limiter.wait_s(PeerId(f"{n}"), 64, n)
    assert len(limiter._peers) <= 101
    assert MAX_PEERS > 100
