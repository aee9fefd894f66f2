"""Plans: objectives, what a plan assigns, and the speed it predicts."""

from __future__ import annotations

import math

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective, Plan, PlannedStage

A, B, C = (PeerId(name) for name in "abc")


def test_named_objectives() -> None:
    assert Objective.named("throughput").value(2.0, 5.0) == 2.0
    assert Objective.named("latency").value(2.0, 5.0) == 5.0
    assert Objective.named("mixed").value(2.0, 5.0) == 3.5
    with pytest.raises(BadOption, match="throughput, latency, mixed"):
        Objective.named("beauty")


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0), (math.nan, 1.0), (math.inf, 0.0)])
def test_impossible_weights_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(BadOption):
        Objective(*weights)


def test_a_plan_says_who_holds_what_and_how_fast_it_will_be() -> None:
    stages = (
        PlannedStage(BlockRange(0, 2), A, 0.01, 0.0, (C,)),
        PlannedStage(BlockRange(2, 3), B, 0.02, 0.01),
    )
    plan = Plan(ModelId("m"), "m", 3, Objective(), stages, (), 0.03, 0.05, 0.02, 0.5, "by hand")
    assert plan.assignments == {A: BlockRange(0, 2), C: BlockRange(0, 2), B: BlockRange(2, 3)}
    assert plan.value == 0.03
    assert plan.tokens_per_s() == pytest.approx(20)
    assert plan.tokens_per_s(streams=100) == pytest.approx(1 / 0.03)
