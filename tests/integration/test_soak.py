"""Answers without a pause while real nodes come and go: a short `bsns bench soak`."""

from __future__ import annotations

from processes import tiny

from bsns.bench.soak import EXACT, bench_soak

__all__ = ["tiny"]


async def test_a_short_soak(tiny: str) -> None:
    """Whether processes grow is for a long one to find."""
    told: list[str] = []
    figures = await bench_soak(tiny, minutes=0.3, streams=4, seed=1, dtype=EXACT, told=told.append, churn_s=3.0)
    assert figures["churn"]["leave"] >= 1
    assert figures["churn"]["join"] >= 1
    assert not [problem for problem in figures["problems"] if "grew" not in problem], told
    assert set(figures["rss_ratio"]) == {"client", *(f"node {number + 1}" for number in range(4))}
