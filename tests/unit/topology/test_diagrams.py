"""Distances between diagrams: by hand, and against persim."""

import math

import numpy as np
import persim
import pytest

from bsns.core.errors import BadSnapshot
from bsns.topology.diagrams import bottleneck, wasserstein

NOTHING = np.zeros((0, 2))


def points(*pairs):
    return np.array(pairs, dtype=float).reshape(-1, 2)


def test_by_hand():
    assert wasserstein(points((0, 2)), NOTHING) == pytest.approx(math.sqrt(2))
    assert bottleneck(points((0, 2)), NOTHING) == 1
    assert wasserstein(points((0, 10)), points((0, 11))) == pytest.approx(1)
    assert bottleneck(points((0, 10)), points((0, 11))) == pytest.approx(1)
    # two small points far apart: both go to the diagonal
    assert wasserstein(points((0, 1)), points((9, 10))) == pytest.approx(math.sqrt(2))
    assert bottleneck(points((0, 1)), points((9, 10))) == 0.5
    # one of two is matched, the other is not
    assert wasserstein(points((0, 10), (4, 5)), points((0, 10))) == pytest.approx(1 / math.sqrt(2))
    assert wasserstein(NOTHING, NOTHING) == bottleneck(NOTHING, NOTHING) == 0


def test_second_order():
    assert wasserstein(points((0, 10), (0, 20)), points((0, 13), (0, 24)), p=2) == pytest.approx(5)


def test_points_without_end_match_each_other_by_birth():
    one, other = points((0, math.inf), (3, math.inf), (0, 2)), points((4, math.inf), (0, math.inf), (0, 2))
    assert wasserstein(one, other) == pytest.approx(1)
    assert bottleneck(one, other) == pytest.approx(1)
    assert wasserstein(one, points((0, math.inf))) == bottleneck(one, points((0, math.inf))) == math.inf


@pytest.mark.parametrize("seed", range(12))
def test_persim_agrees(seed):
    rng = np.random.default_rng(seed)
    births, others = rng.random((rng.integers(1, 25), 1)), rng.random((rng.integers(1, 25), 1))
    one = np.hstack([births, births + rng.exponential(0.3, births.shape)])
    other = np.hstack([others, others + rng.exponential(0.3, others.shape)])
    assert wasserstein(one, other) == pytest.approx(persim.wasserstein(one, other), rel=1e-6)
    assert bottleneck(one, other) == pytest.approx(persim.bottleneck(one, other), rel=1e-6)


@pytest.mark.parametrize("bad", [points((2, 1)), points((math.nan, 1)), points((-math.inf, 1)), np.zeros((2, 3))])
def test_what_is_no_diagram(bad):
    for distance in (wasserstein, bottleneck):
        with pytest.raises(BadSnapshot):
            distance(bad, NOTHING)
    with pytest.raises(BadSnapshot):
        wasserstein(NOTHING, NOTHING, p=0.5)
