"""What the dashboard shows, as typed values. Nodes go by short names; addresses and texts are not in it.

Blocks are half-open, times in milliseconds unless a name says otherwise, `…_s` dates in Unix time.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

GATEWAY = "gateway"
"""This gateway's own name among those of nodes."""
NodeCondition = Literal["serving", "joining", "leaving", "silent", "lost"]
EventKind = Literal["lost", "back", "joined", "left", "moved", "repaired"]


class NodeState(BaseModel):
    """A node, as it answered just now, or when it last did."""

    name: str
    blocks: list[tuple[int, int]]
    condition: NodeCondition
    """`silent`: it did not answer this time; `lost`: nor for a while before."""
    answered_s: float
    device: str
    dtype: str
    executor: str
    threads: int
    cache_tokens: int
    cache_tokens_left: int
    sessions: int
    waiting: int
    """Steps that wait for a batch."""
    rows_per_s: float
    """Tokens computed, those of prompts among them."""
    block_time_ms: float
    round_trip_ms: float | None
    """From this gateway."""
    resident_bytes: int


class LinkState(BaseModel):
    """A measured way between two nodes, or from this gateway to one."""

    a: str
    b: str
    round_trip_ms: float
    spread_ms: float
    mb_per_s: float | None
    age_s: float


class SwarmState(BaseModel):
    """The same for all who watch."""

    model: str
    block_count: int
    nodes: list[NodeState]
    nodes_not_shown: int
    links: list[LinkState]
    missing: list[tuple[int, int]]
    """Blocks that nobody serves."""
    tokens_per_s: float
    history: list[float]
    """Of tokens per second, the newest last, one for each look."""
    every_s: float
    """How long it is from one look to the next."""
    answers: int
    """Under way."""
    repairs: int
    """Lost stages replaced since the gateway's start."""


class HopState(BaseModel):
    node: str
    blocks: tuple[int, int]


class SessionState(BaseModel):
    """An answer under way. Of others' nothing is told but that there is one."""

    id: str
    route: list[HopState] | None
    tokens: int | None
    tokens_per_s: float | None
    age_s: float | None


class EventState(BaseModel):
    """Something that happened, in a sentence."""

    number: int
    at_s: float
    kind: EventKind
    text: str


class StageState(BaseModel):
    blocks: tuple[int, int]
    nodes: list[str]
    compute_ms: float
    transfer_ms: float


class ReasonState(BaseModel):
    node: str
    reason: str


class AlternativeState(BaseModel):
    name: str
    tokens_per_s: float | None
    """Of one stream."""
    against: str
    """What it costs beside the plan."""


class PlanState(BaseModel):
    """The best plan for the nodes that are here, as `bsns plan` tells it and the swarm's orchestrator plans."""

    made_s: float
    trouble: str | None
    """Why there is no plan; all else is empty then."""
    stages: list[StageState]
    gap: float
    speeds: str
    proof: str
    advice: list[str]
    left_out: list[ReasonState]
    alternatives: list[AlternativeState]
    assumptions: list[str]


class ShapeState(BaseModel):
    """The network's persistent homology, as `bsns topology` tells it. Bars are birth and death; None: never."""

    nodes: int
    clusters: list[tuple[float, float | None]]
    loops: list[tuple[float, float | None]]
    words: list[str]
    assumptions: list[str]


class DashboardState(BaseModel):
    """All of it. Plan and shape are None until they are computed."""

    swarm: SwarmState
    sessions: list[SessionState]
    events: list[EventState]
    plan: PlanState | None
    shape: ShapeState | None
