"""Plans: who holds which blocks, what that costs, how far from the best possible it is, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.ids import ModelId, PeerId

ROWS_PER_BLOCK_TIME = 4
"""How many further rows of a batch add about as much as the first, roughly: weights are read once for all of them."""
LEAST_CACHE_TOKENS = 2048
"""Of KV cache that a node keeps at least, and that a plan therefore counts on."""
ONE_NODE = "one node alone"
"""The alternative of not cutting the model."""


def block_times(rows: int) -> float:
    """How many times as long as one row a batch of so many takes, by and large."""
    return 1 + (rows - 1) / ROWS_PER_BLOCK_TIME


_NAMED = {"throughput": (1.0, 0.0), "latency": (0.0, 1.0), "mixed": (0.5, 0.5)}


@dataclass(frozen=True, slots=True)
class Objective:
    """What a plan minimises: `bottleneck` · its slowest stage + `latency` · one token's way through all, in seconds."""

    bottleneck: float = 1.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.bottleneck, self.latency)
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
            raise BadOption(f"the weights {weights} of an objective must not be negative, nor both 0")

    def value(self, bottleneck_s: float, latency_s: float) -> float:
        return self.bottleneck * bottleneck_s + self.latency * latency_s

    @classmethod
    def named(cls, name: str) -> Objective:
        """`throughput`, `latency`, or `mixed`, which weighs both alike. Raises BadOption."""
        if name not in _NAMED:
            raise BadOption(f"there is no objective {name!r}; use {', '.join(_NAMED)}")
        return cls(*_NAMED[name])

    @property
    def name(self) -> str:
        """What `named` takes, or the weights where they have no name."""
        weights = (self.bottleneck, self.latency)
        named = (name for name, known in _NAMED.items() if known == weights)
        return next(named, f"{self.bottleneck:g} × slowest stage + {self.latency:g} × latency")


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A range, the node that computes it, and the nodes that hold it too. Seconds are those of one token."""

    blocks: BlockRange
    peer: PeerId
    compute_s: float
    transfer_s: float
    """Activations' way in: from the stage before, or from the client."""
    replicas: tuple[PeerId, ...] = ()

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return (self.peer, *self.replicas)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A node that holds nothing under a plan, and why."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """A plan that was not taken: whose rule it follows, what it would cost, or why it is impossible."""

    name: str
    bottleneck_s: float | None
    latency_s: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout with its proof. `bottleneck_s` is the slowest stage's time for a token, its replicas sharing the work;
    `latency_s` one token's way along the chain, client and return included; both without queueing.

    `lower_bound_s` bounds the objective's value of every possible plan, and `gap` = value / lower_bound_s − 1.
    """

    model: ModelId
    model_name: str
    block_count: int
    objective: Objective
    stages: tuple[PlannedStage, ...]
    left_out: tuple[LeftOut, ...]
    bottleneck_s: float
    latency_s: float
    lower_bound_s: float
    gap: float
    method: str
    """Which engine found it."""
    alternatives: tuple[Alternative, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def value(self) -> float:
        return self.objective.value(self.bottleneck_s, self.latency_s)

    @property
    def assignments(self) -> Mapping[PeerId, BlockRange]:
        return {peer: stage.blocks for stage in self.stages for peer in stage.peers}

    def tokens_per_s(self, streams: int = 1) -> float:
        """Predicted speed of so many streams together, on nodes that do nothing else.

        As nodes work (worker.batching): sending goes on while they compute, so that computing alone can hold a stage
        up; where steps have to wait they run together, up to ⌈streams / stages⌉ of them, which makes the batch longer
        and the stage's work per token less. Replicas are taken to be as fast as the stage's node.
        """
        computing_s = sum(stage.compute_s for stage in self.stages)
        slowest_s = max((stage.compute_s / len(stage.peers) for stage in self.stages), default=0.0)
        best = 0.0
        for rows in range(1, -(-streams // max(len(self.stages), 1)) + 1):
            further = (rows - 1) / ROWS_PER_BLOCK_TIME
            arriving = streams / (self.latency_s + computing_s * further)
            served = rows / (slowest_s * (1 + further)) if slowest_s > 0 else math.inf
            best = max(best, min(arriving, served))
        return best
