"""The port to the model that answers, and the swarm behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from bsns.client.generate import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.core.blocks import BlockRange, missing_blocks
from bsns.node.client import Client


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

    @property
    def repairs(self) -> int:
        return self._client.generator.repairs

    def stream(
        self, tokens: Sequence[int], options: SamplingOptions, stats: Stats, constraint: Constraint | None, tenant: str
    ) -> AsyncGenerator[Piece, None]:
        return self._client.generator.stream(tokens, options, stats, constraint, tenant=tenant)

    async def missing(self) -> tuple[BlockRange, ...]:
        held = [record.blocks for record in await self._client.view.records() if record.state == "serving"]
        return missing_blocks(held, self._client.source.block_count)
