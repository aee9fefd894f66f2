"""What the orchestrator announces in the directory: its lease, and the plan that is in force under it."""

from __future__ import annotations

import msgspec

from bsns.core.ids import ModelId, PeerId


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """A node and the blocks, half-open, that it shall hold."""

    peer: PeerId
    start: int
    end: int


class PlanRecord(msgspec.Struct, frozen=True):
    """A lease on the office of orchestrator, and the plan under it. Times in seconds, `…_s` dates in Unix time."""

    author: PeerId
    model: ModelId
    block_count: int
    dtype: str
    term: int
    """Counts the orchestrators a model has had; one keeps its term as long as it renews the lease."""
    lot: bytes
    """The author's draw for this term (swarm.plans): its right to the lease against others that claim the same term."""
    version: int
    """Counts the plans of a term; 0: a lease without a plan yet."""
    objective: tuple[float, float]
    """Weights of bottleneck and latency, as core.plan.Objective."""
    assignments: tuple[Assignment, ...]
    """Nodes with equal ranges are replicas; a node that is not named keeps what it holds."""
    bottleneck_s: float
    latency_s: float
    lower_bound_s: float
    issued_s: float
    expires_s: float
    """When the lease lapses unless it is renewed."""
