"""The port to the model that answers, and the swarm behind it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from bsns.client.pieces import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.client.tally import Tally
from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.plan import LEAST_CACHE_TOKENS, Objective, Plan
from bsns.core.snapshot import Snapshot
from bsns.model.shapes import shape_of
from bsns.node.client import Client
from bsns.node.orchestrator import best_plan
from bsns.node.view import NodeStatus

ANSWERS_FRESH_S = 1.0
ANSWER_S = 1.5
"""What a node may take to answer: the others' answers shall not wait for one that is gone."""
PLAN_S = 0.5
"""What a plan for the dashboard may take: answers share the process with it."""


class Engine(Protocol):
    """Answers tokenised prompts, many at once. Closing a stream frees what it holds; errors are BsnsErrors."""

    name: str
    prompts: Prompts
    context_tokens: int
    vocab_size: int
    block_count: int

    @property
    def repairs(self) -> int:
        """How many times a lost stage has been replaced so far."""
        ...

    @property
    def tally(self) -> Tally: ...

    def stream(
        self, tokens: Sequence[int], options: SamplingOptions, stats: Stats, constraint: Constraint | None, tenant: str
    ) -> AsyncGenerator[Piece, None]:
        """`tenant`: whose prompt it is; what the swarm keeps of it serves nobody else's."""
        ...

    async def missing(self) -> tuple[BlockRange, ...]:
        """The blocks that nobody serves now."""
        ...

    async def nodes(self) -> Sequence[NodeStatus]:
        """Every node of the model, as it announced itself and as it answers now."""
        ...

    def snapshot(self) -> Snapshot:
        """The swarm as the engine last saw it, with its own ways to the nodes."""
        ...

    def plan(self, seen: Snapshot) -> Plan:
        """The best plan for these nodes; takes a while, and belongs into a thread. Raises BsnsError."""
        ...


class SwarmEngine:
    """The model that a connected client uses over its swarm."""

    def __init__(self, client: Client) -> None:
        self._client, generator = client, client.generator
        self.name = client.source.name
        self.prompts = generator.prompts
        self.context_tokens = generator.context_tokens
        self.vocab_size = generator.vocab_size
        self._looking = asyncio.Lock()
        self._looked_s = -math.inf
        self._nodes: Sequence[NodeStatus] = ()
        self.block_count = client.source.block_count

    @property
    def repairs(self) -> int:
        return self._client.generator.repairs

    @property
    def tally(self) -> Tally:
        return self._client.generator.tally

    def stream(
        self, tokens: Sequence[int], options: SamplingOptions, stats: Stats, constraint: Constraint | None, tenant: str
    ) -> AsyncGenerator[Piece, None]:
        return self._client.generator.stream(tokens, options, stats, constraint, tenant=tenant)

    async def missing(self) -> tuple[BlockRange, ...]:
        here = [node.record for node in await self.nodes() if node.now is not None and node.record.state == "serving"]
        return missing_blocks((blocks for record in here for blocks in record.ranges), self.block_count)

    async def nodes(self) -> Sequence[NodeStatus]:
        """Asks the nodes themselves, for a record outlives its node by a minute; at most every `ANSWERS_FRESH_S`, since
        anybody may ask this."""
        async with self._looking:
            now_s = time.monotonic()
            if now_s - self._looked_s >= ANSWERS_FRESH_S:
                self._nodes = await self._client.status(ANSWER_S)
                self._looked_s = now_s
        return self._nodes

    def snapshot(self) -> Snapshot:
        return self._client.view.snapshot()

    def plan(self, seen: Snapshot) -> Plan:
        dtype = seen.nodes[0].dtype if seen.nodes else "bfloat16"
        shape = shape_of(self._client.source, dtype)
        return best_plan(seen, shape, Objective(), LEAST_CACHE_TOKENS, plan_s=PLAN_S)
