"""The genetic engine: the same from the same seed, never worse than where it starts, and as good as pymoo's."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bsns.core.errors import BadOption
from bsns.planning.brkga import Settings, evolve

Floats = NDArray[np.float64]
SMALL = Settings(population=20, generations=15)


def tour(keys_PK: Floats) -> Floats:
    """Length of the round trip that visits points on a circle, shuffled, in the order of the keys; at best about 2π."""
    count = keys_PK.shape[1]
    angles = 2 * np.pi * np.random.default_rng(5).permutation(count) / count
    order = np.argsort(keys_PK, axis=1, kind="stable")
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)[order]
    return np.asarray(np.linalg.norm(points - np.roll(points, 1, axis=1), axis=2).sum(axis=1))


def test_the_same_seed_evolves_the_same() -> None:
    one, other = (evolve(tour, 12, rng=np.random.default_rng(7), settings=SMALL) for _ in range(2))
    assert one.cost == other.cost
    assert (one.keys == other.keys).all()
    assert one.history == other.history
    assert evolve(tour, 12, rng=np.random.default_rng(8), settings=SMALL).history != one.history


def test_a_result_costs_what_its_keys_cost_and_never_grows() -> None:
    evolved = evolve(tour, 12, rng=np.random.default_rng(1), settings=SMALL)
    assert tour(evolved.keys[None])[0] == evolved.cost == evolved.history[-1]
    assert list(evolved.history) == sorted(evolved.history, reverse=True)
    assert len(evolved.history) == SMALL.generations
    assert ((evolved.keys >= 0) & (evolved.keys < 1)).all()


def test_never_worse_than_a_warm_start() -> None:
    best = evolve(tour, 12, rng=np.random.default_rng(2), settings=Settings(60, 60))
    warm = np.concatenate([np.full((1, 12), 2.0), best.keys[None]])  # what lies outside [0, 1) is brought inside
    again = evolve(tour, 12, rng=np.random.default_rng(3), settings=Settings(4, 2), warm=warm)
    assert again.cost <= best.cost
    assert again.history[0] <= best.cost


def test_a_population_keeps_no_more_warm_starts_than_it_has_room_for() -> None:
    warm = np.random.default_rng(4).random((50, 12))
    evolved = evolve(tour, 12, rng=np.random.default_rng(5), settings=Settings(10, 1), warm=warm)
    assert evolved.cost == tour(warm[:10]).min()


def test_it_stops_after_the_generation_in_which_it_is_told() -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    evolved = evolve(tour, 12, rng=np.random.default_rng(6), settings=Settings(10, 50), should_stop=should_stop)
    assert len(evolved.history) == 4
    assert asked == 4


def test_copies_give_way_to_mutants() -> None:
    """With all parents alike, every child is a copy; what is decoded must still be new."""
    seen: list[Floats] = []

    def decode(keys_PK: Floats) -> Floats:
        seen.append(keys_PK)
        return tour(keys_PK)

    warm = np.repeat(np.random.default_rng(9).random((1, 12)), 10, axis=0)
    evolve(decode, 12, rng=np.random.default_rng(10), settings=Settings(10, 2, mutants=0.0), warm=warm)
    assert len(np.unique(np.concatenate([warm[:1], seen[1]]), axis=0)) == 1 + len(seen[1])


def test_what_cannot_be_costs_infinitely_much_and_does_not_survive() -> None:
    def half(keys_PK: Floats) -> Floats:
        return np.where(keys_PK[:, 0] < 0.5, tour(keys_PK), np.inf)

    assert evolve(half, 8, rng=np.random.default_rng(7), settings=SMALL).keys[0] < 0.5
    nothing = evolve(lambda keys: np.full(len(keys), np.inf), 3, rng=np.random.default_rng(8), settings=SMALL)
    assert nothing.cost == np.inf


def test_as_good_as_pymoo_within_the_same_budget() -> None:
    """Medians over seeds, both with the shares that the authors recommend."""
    from pymoo.algorithms.soo.nonconvex.brkga import BRKGA
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize

    class Tour(Problem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=12, n_obj=1, xl=0.0, xu=1.0)

        def _evaluate(self, x: Floats, out: dict[str, Floats], *args: object, **kwargs: object) -> None:
            out["F"] = tour(x)[:, None]

    settings = Settings(population=50, generations=40)
    ours = [evolve(tour, 12, rng=np.random.default_rng(seed), settings=settings).cost for seed in range(15)]
    theirs = []
    for seed in range(15):
        algorithm = BRKGA(n_elites=10, n_offsprings=32, n_mutants=8, bias=0.7, eliminate_duplicates=False)
        theirs.append(float(minimize(Tour(), algorithm, ("n_gen", 40), seed=seed).F[0]))
    assert np.median(ours) <= np.median(theirs) * 1.02
    assert min(*ours, *theirs) >= 24 * np.sin(np.pi / 12) - 1e-9  # a regular polygon


@pytest.mark.parametrize("wrong", [{"population": 1}, {"generations": 0}, {"elite": 0.9}, {"inherit": 0.4}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadOption):
        Settings(**wrong)  # type: ignore[arg-type]
