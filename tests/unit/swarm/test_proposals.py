"""What an orchestrator proposes: for whom it plans, around whom, and when things stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import MissingBlocks, NotEnoughMemory
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective, Plan, PlannedStage
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.proposals import Planner, Proposal, assignments_of, propose

MODEL = ModelId("m")
SHAPE = ModelShape(MODEL, "tiny", (100,) * 6, 1, 1000, dtype="float32")
A, B, C, D = (PeerId(name) for name in "abcd")
NOW_S = 1000.0


def record(peer: PeerId, start: int, end: int, **changes: Any) -> NodeRecord:
    plain = NodeRecord(
        *(peer, (), MODEL, "tiny", 6, start, end, "serving", "cpu", "float32", "torch", 1),
        *(4096, 4096, 0.1, 1, "0", 0.0, NOW_S + 60),
        memory_bytes=10_000,
        follows=True,
    )
    return msgspec.structs.replace(plain, **changes)


def plan_record(assignments: Mapping[PeerId, tuple[int, int]], author: PeerId = A) -> PlanRecord:
    ranges = {peer: BlockRange(*blocks) for peer, blocks in assignments.items()}
    named = assignments_of(ranges)
    return PlanRecord(author, MODEL, 6, "float32", 1, b"", 1, (1.0, 0.0), named, 0.0, 0.0, 0.0, NOW_S, NOW_S + 10)


def planner(answer: Mapping[PeerId, tuple[int, int]], *, most_blocks: int = 6) -> Planner:
    """A planner that knows the answer, where the model is not longer than `most_blocks`."""

    def plan(view: Snapshot, shape: ModelShape, objective: Objective, cache_tokens: int) -> Plan:
        if shape.block_count > most_blocks:
            raise NotEnoughMemory("no")
        assert {node.peer for node in view.nodes} >= set(answer)
        stages = tuple(PlannedStage(BlockRange(*blocks), peer, 0.0, 0.0) for peer, blocks in answer.items())
        return Plan(MODEL, "tiny", shape.block_count, objective, stages, (), 1.0, 1.0, 0.5, 1.0, "known")

    return plan


def proposed(
    records: list[NodeRecord], plan: Planner, last: PlanRecord | None = None, *, first: bool = False
) -> Proposal:
    return propose(records, last, SHAPE, plan, Objective(), 0, NOW_S, first=first)


def test_a_better_plan_is_proposed_with_its_reason() -> None:
    uneven = [record(A, 0, 5), record(B, 5, 6)]
    better = proposed(uneven, planner({A: (0, 3), B: (3, 6)}))
    assert better.reason is not None
    assert "% better" in better.reason
    assert better.ranges == {A: BlockRange(0, 3), B: BlockRange(3, 6)}
    assert better.lower_bound_s == 0.5
    assert proposed([record(A, 0, 4), record(B, 4, 6)], planner({A: (0, 5), B: (5, 6)})).reason is None


def test_the_first_plan_of_a_term_says_that_things_stay() -> None:
    records = [record(A, 0, 3), record(B, 3, 6), record(C, 3, 6, state="joining")]
    worse = planner({A: (0, 5), B: (5, 6)})
    kept = proposed(records, worse, first=True)
    assert kept.reason == "things stay as they are"
    assert kept.ranges == {A: BlockRange(0, 3), B: BlockRange(3, 6)}
    planned = plan_record({A: (0, 3), B: (3, 6), D: (0, 6)})  # D is gone; who is left need not move for that
    inherited = proposed(records, worse, planned, first=True)
    assert inherited.reason == "things stay as they were planned"
    assert inherited.ranges == {A: BlockRange(0, 3), B: BlockRange(3, 6)}
    assert proposed(records, worse, planned).reason is None


def test_a_plan_whose_nodes_are_gone_is_replaced() -> None:
    last = plan_record({A: (0, 3), D: (3, 6)})
    lost = proposed([record(A, 0, 3), record(B, 0, 3)], planner({A: (0, 3), B: (3, 6)}), last)
    assert lost.reason == "some blocks are held by nobody"
    saved = proposed([record(A, 0, 3), record(B, 0, 6)], planner({A: (0, 3), B: (3, 6)}), last)
    assert saved.reason is not None


def test_pinned_nodes_are_planned_around() -> None:
    """Over the whole model where those that follow can hold it; else over what lies between the pinned."""
    records = [record(A, 1, 5), record(C, 0, 1, follows=False), record(D, 5, 6, follows=False)]
    whole = proposed(records, planner({A: (0, 6)}), first=True)
    assert whole.ranges == {A: BlockRange(1, 5)}
    part = proposed(records, planner({A: (0, 4)}, most_blocks=4), first=True)
    assert part.ranges == {A: BlockRange(1, 5)}
    moved = proposed([record(A, 0, 1), *records[1:]], planner({A: (0, 4)}, most_blocks=4))
    assert (moved.ranges, moved.reason) == ({A: BlockRange(1, 5)}, "some blocks are held by nobody")
    with pytest.raises(NotEnoughMemory):
        proposed(records, planner({A: (0, 3)}, most_blocks=3))
    with pytest.raises(MissingBlocks):
        proposed(records[1:], planner({}))


def test_nodes_that_have_not_measured_themselves_are_not_planned() -> None:
    with pytest.raises(MissingBlocks):
        proposed([record(A, 0, 6, block_time_s=0.0)], planner({A: (0, 6)}))
    with pytest.raises(MissingBlocks):
        proposed([record(A, 0, 6, memory_bytes=0)], planner({A: (0, 6)}))


def test_newcomers_get_a_place_without_a_move() -> None:
    last = plan_record({A: (0, 3), B: (3, 6)})
    records = [record(A, 0, 3), record(B, 3, 6), record(C, 0, 1, block_time_s=0.9)]
    helped = proposed(records, planner({A: (0, 3), B: (3, 6), C: (3, 6)}), last)
    assert helped.reason == "newcomers have a place"  # a tenth better: too little to move for, had somebody to
    moved = proposed(records, planner({A: (3, 6), B: (0, 3), C: (3, 6)}), last)
    assert moved.reason is None
    useless = proposed(records, planner({A: (0, 3), B: (3, 6), C: (0, 3)}), last)
    assert useless.reason is None  # the slowest stage is the other one
