"""Plans: objectives, what a plan assigns, and the speed it predicts."""

from __future__ import annotations

import math
from itertools import pairwise

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
    assert [Objective.named(name).name for name in ("throughput", "latency", "mixed")] == [
        "throughput",
        "latency",
        "mixed",
    ]
    assert Objective(1.0, 2.0).name == "1 × slowest stage + 2 × latency"


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


def chain(*compute_s: float, hop_s: float, replicas: tuple[PeerId, ...] = ()) -> Plan:
    stages = tuple(
        PlannedStage(BlockRange(n, n + 1), PeerId(f"node {n}"), one_s, hop_s, replicas)
        for n, one_s in enumerate(compute_s)
    )
    latency_s = sum(compute_s) + hop_s * (len(stages) + 1)
    return Plan(ModelId("m"), "m", 9, Objective(), stages, (), max(compute_s) + hop_s, latency_s, 0.0, 0.0, "by hand")


@pytest.mark.parametrize(
    ("plan", "streams", "tokens_per_s"),
    [
        (chain(0.02, 0.02, hop_s=0.02), 1, 1 / 0.1),
        (chain(0.02, 0.02, hop_s=0.02), 2, 2 / 0.1),  # on their way at the same time, never in each other's
        (chain(0.03, 0.01, hop_s=0.01), 2, 2 / 0.07),
        (chain(0.05, 0.01, hop_s=0.0), 2, 1 / 0.05),  # one waits for the other
        (chain(0.08, 0.02, hop_s=0.01), 4, 2 / 0.1),  # the slow stage takes two at once: 0.08 · (1 + 1/4)
        (chain(0.05, 0.05, hop_s=0.02), 4, 4 / (0.16 + 0.1 / 4)),  # batches are longer for those within
        (chain(0.05, hop_s=0.0), 9, 9 / (0.05 * 3)),
        (chain(0.05, 0.01, hop_s=0.0, replicas=(C,)), 2, 2 / 0.06),
    ],
)
def test_streams_share_stages_as_nodes_batch_them(plan: Plan, streams: int, tokens_per_s: float) -> None:
    assert plan.tokens_per_s(streams) == pytest.approx(tokens_per_s)


def test_more_streams_are_never_slower() -> None:
    plan = chain(0.03, 0.01, 0.02, hop_s=0.02)
    speeds = [plan.tokens_per_s(streams) for streams in range(1, 60)]
    assert all(after >= before for before, after in pairwise(speeds))
