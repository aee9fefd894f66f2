"""Proposals: the plan an orchestrator would make now, judged against what its nodes hold already. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BsnsError, MissingBlocks
from bsns.core.ids import PeerId
from bsns.core.plan import Objective, Plan
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.planning.layouts import Cost, layout_cost, why_move
from bsns.planning.network import chain_problem
from bsns.protocol.plans import Assignment, PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.plans import ranges_of
from bsns.swarm.snapshot import snapshot

Planner = Callable[[Snapshot, ModelShape, Objective, int], Plan]
"""The best plan for a snapshot, with so many tokens of cache on every node; raises BsnsError where there is none."""
Ranges = Mapping[PeerId, BlockRange]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Who should hold what, what that costs, and why it should replace what is in force: None if it should not."""

    ranges: Ranges
    cost: Cost
    lower_bound_s: float
    reason: str | None


def propose(
    records: Sequence[NodeRecord],
    last: PlanRecord | None,
    shape: ModelShape,
    planner: Planner,
    objective: Objective,
    cache_tokens: int,
    now_s: float,
    *,
    first: bool,
) -> Proposal:
    """The best plan for the nodes of `records`, which are here, after `last`, the plan that was in force.

    The first of a term always has a reason: where no other is worth moving for, things stay as they are, and that is
    said, so that nodes know who is to hold what. Raises BsnsError where there is no plan.
    """
    records = [record for record in records if record.block_time_s > 0 and record.memory_bytes > 0]
    following = {record.peer: record for record in records if record.follows}
    if not following:
        raise MissingBlocks("no node that has measured itself follows plans; there is nothing to plan")
    view = snapshot(records, now_s)
    problem = chain_problem(view, shape, cache_tokens=cache_tokens)
    pinned = {record.peer: (record.blocks,) for record in records if not record.follows}
    ordered = {peer: at for peer, at in ranges_of(last).items() if peer in following} if last is not None else {}

    def cost(ranges: Ranges) -> Cost:
        return layout_cost(problem, pinned | {peer: (at,) for peer, at in ranges.items()}, objective)

    held_cost = layout_cost(problem, {r.peer: r.ranges for r in records if r.state == "serving"}, objective)
    ordered_cost = cost(ordered) if ordered else held_cost
    found, lower_bound_s = _search(view, shape, planner, objective, cache_tokens, set(following), pinned)
    new_cost = cost(found)
    held_value, ordered_value = held_cost.value(objective), ordered_cost.value(objective)
    reason = why_move(held_value, ordered_value, new_cost.value(objective), ordered, found)
    if reason is not None or not first:
        return Proposal(found, new_cost, lower_bound_s, reason)
    if ordered and ordered_value <= held_value:
        return Proposal(ordered, ordered_cost, lower_bound_s, "things stay as they were planned")
    held = {peer: record.blocks for peer, record in following.items() if record.state == "serving"}
    return Proposal(held, held_cost, lower_bound_s, "things stay as they are")


def assignments_of(ranges: Ranges) -> tuple[Assignment, ...]:
    """Who shall hold what, as it travels."""
    return tuple(Assignment(peer, blocks.start, blocks.end) for peer, blocks in sorted(ranges.items()))


def _search(
    view: Snapshot,
    shape: ModelShape,
    planner: Planner,
    objective: Objective,
    cache_tokens: int,
    following: set[PeerId],
    pinned: Mapping[PeerId, Sequence[BlockRange]],
) -> tuple[dict[PeerId, BlockRange], float]:
    """Who of the following shall hold what, and the bound on that. Raises BsnsError where nothing fits.

    They are planned over the whole model if they can hold it; else from the first to the last block that no pinned
    node holds. What pinned nodes hold comes on top, for routes to use.
    """
    view = replace(view, nodes=tuple(node for node in view.nodes if node.peer in following))
    start = 0
    try:
        plan = planner(view, shape, objective, cache_tokens)
    except BsnsError:
        gaps = missing_blocks([blocks for ranges in pinned.values() for blocks in ranges], shape.block_count)
        if not pinned or not gaps:
            raise
        start, end = gaps[0].start, gaps[-1].end
        part = replace(shape, block_bytes=shape.block_bytes[start:end], block_work=shape.block_work[start:end])
        plan = planner(view, part, objective, cache_tokens)
    found = {peer: BlockRange(at.start + start, at.end + start) for peer, at in plan.assignments.items()}
    return found, plan.lower_bound_s
