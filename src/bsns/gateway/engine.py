"""The port to the model that answers, and the swarm behind it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from bsns.client.generate import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.client.tally import Tally
from bsns.core.blocks import BlockRange, missing_blocks
from bsns.node.client import Client

READY_FRESH_S = 2.0


class Engine(Protocol):
    """Answers tokenised prompts, many at once. Closing a stream frees what it holds; errors are BsnsErrors."""

    name: str
    prompts: Prompts
    context_tokens: int
    vocab_size: int

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
        self._gaps: tuple[BlockRange, ...] = ()

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
        """Asks the nodes themselves, for a record outlives its node by a minute; at most every `READY_FRESH_S`, since
        anybody may ask this."""
        async with self._looking:
            now_s = time.monotonic()
            if now_s - self._looked_s > READY_FRESH_S:
                nodes = await self._client.status()
                here = [node.record for node in nodes if node.now is not None and node.record.state == "serving"]
                self._gaps = missing_blocks((record.blocks for record in here), self._client.source.block_count)
                self._looked_s = now_s
        return self._gaps
