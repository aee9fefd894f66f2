"""Plan and shape for the dashboard: solved in a thread, when what they are made from has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from bsns.core.errors import BsnsError
from bsns.core.ids import short_names
from bsns.core.plan import Plan
from bsns.core.snapshot import Snapshot
from bsns.gateway.state import AlternativeState, PlanState, ReasonState, ShapeState, StageState
from bsns.planning.account import advice, against, proof, speeds
from bsns.topology.distance import Floats, distances
from bsns.topology.persistence import persistence
from bsns.topology.summary import clusters_in_words, loops_in_words, summary

log = structlog.get_logger(__name__)
T = TypeVar("T")

MOST_REASONS = 20
MOST_BARS = 120
"""Of each kind, the longest."""


class Solver(Generic[T]):
    """The newest solution of one kind; at most one is under way, and begins no sooner than `every_s` after the last."""

    def __init__(self, every_s: float, now_s: Callable[[], float]) -> None:
        self.value: T | None = None
        self._every_s, self._now_s = every_s, now_s
        self._look: object = None
        self._began_s = -math.inf
        self._solving: asyncio.Task[None] | None = None

    def refresh(self, look: object, solve: Callable[[], T]) -> None:
        """Solve anew, in a thread, unless `look`, what the solution depends on, is as it was."""
        busy = self._solving is not None and not self._solving.done()
        if busy or look == self._look or self._now_s() - self._began_s < self._every_s:
            return
        self._look, self._began_s = look, self._now_s()
        self._solving = asyncio.create_task(self._solve(solve))

    async def _solve(self, solve: Callable[[], T]) -> None:
        try:
            self.value = await asyncio.to_thread(solve)
        except Exception:
            log.exception("the dashboard could not compute what it shows; trying again when the swarm has changed")


def look_of_nodes(seen: Snapshot) -> object:
    """What of a swarm matters to plans: who is there, and their speed, in steps of about a fifth."""
    return tuple(
        (node.peer, node.held, node.memory_bytes, round(4 * math.log2(node.block_time_s))) for node in seen.nodes
    )


def look_of_links(seen: Snapshot) -> object:
    """What of a network matters to its shape: who is there, and the ways, in steps of about a fifth."""
    here = frozenset(node.peer for node in seen.nodes)
    ways = ((ends, round(4 * math.log2(max(link.round_trip_s, 1e-6)))) for ends, link in seen.links.items())
    return here, frozenset((ends, step) for ends, step in ways if here.issuperset(ends))


def plan_state(make: Callable[[Snapshot], Plan], seen: Snapshot, now_s: float) -> PlanState:
    """The best plan for a snapshot, or why there is none."""
    try:
        plan = make(seen)
    except BsnsError as error:
        return PlanState(
            made_s=now_s,
            trouble=error.message,
            stages=[],
            gap=0.0,
            speeds="",
            proof="",
            advice=[],
            left_out=[],
            alternatives=[],
            assumptions=[],
        )
    names = short_names(node.peer for node in seen.nodes)
    return PlanState(
        made_s=now_s,
        trouble=None,
        stages=[
            StageState(
                blocks=(stage.blocks.start, stage.blocks.end),
                nodes=[names[peer] for peer in stage.peers],
                compute_ms=round(stage.compute_s * 1e3, 3),
                transfer_ms=round(stage.transfer_s * 1e3, 3),
            )
            for stage in plan.stages
        ],
        gap=plan.gap,
        speeds=speeds(plan),
        proof=proof(plan),
        advice=advice(plan),
        left_out=[ReasonState(node=names[node.peer], reason=node.reason) for node in plan.left_out[:MOST_REASONS]],
        alternatives=[
            AlternativeState(
                name=other.name,
                tokens_per_s=round(1 / other.latency_s, 1) if other.latency_s else None,
                against=against(plan, other),
            )
            for other in plan.alternatives
        ],
        assumptions=list(plan.assumptions[:MOST_REASONS]),
    )


def shape_state(seen: Snapshot) -> ShapeState | None:
    """The network's barcode; None for a swarm of nobody."""
    if not seen.nodes:
        return None
    known = distances(seen)
    diagrams = persistence(known.matrix_MM)
    told = summary(known, diagrams, seen)
    alone = known.node_count == 1
    return ShapeState(
        nodes=known.node_count,
        clusters=_bars(diagrams.h0),
        loops=_bars(diagrams.h1),
        words=["one node: a network of one has no shape"]
        if alone
        else [line.strip() for line in (*clusters_in_words(told), *loops_in_words(told))],
        assumptions=list(known.assumptions),
    )


def _bars(points_K2: Floats) -> list[tuple[float, float | None]]:
    """The longest bars, in milliseconds, in order of birth and death."""
    bars = [(born * 1e3, died * 1e3 if math.isfinite(died) else None) for born, died in points_K2.tolist()]
    longest = sorted(bars, key=lambda bar: -(math.inf if bar[1] is None else bar[1] - bar[0]))[:MOST_BARS]
    return sorted(longest, key=lambda bar: (bar[0], math.inf if bar[1] is None else bar[1]))
