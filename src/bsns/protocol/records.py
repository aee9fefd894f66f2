"""What a node announces about itself in the swarm's directory."""

from __future__ import annotations

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId


class LinkRecord(msgspec.Struct, frozen=True, array_like=True):
    """What a node measured of its way to another: medians of round trips, as core.snapshot.Link; Unix time."""

    peer: PeerId
    round_trip_s: float
    spread_s: float
    bytes_per_s: float
    measured_s: float


class NodeRecord(msgspec.Struct, frozen=True):
    """A node's card. Blocks are half-open; times in seconds, sizes in tokens or bytes; `expires_s` is Unix time."""

    peer: PeerId
    addresses: tuple[str, ...]
    model: ModelId
    model_name: str
    block_count: int
    start: int
    end: int
    state: str
    """`joining` while the range loads, `serving`, or `leaving`."""
    device: str
    dtype: str
    executor: str
    threads: int
    cache_tokens: int
    cache_tokens_left: int
    block_time_s: float
    """Measured time of one block for one token at batch 1."""
    rss_bytes: int
    version: str
    started_s: float
    expires_s: float
    others: tuple[tuple[int, int], ...] = ()
    """Further ranges it serves as well, while it moves from one to another."""
    prefill_time_s: float = 0.0
    """Measured time of one block for each prompt token of a chunk; 0 where unknown."""
    memory_bytes: int = 0
    """What it may use for weights and caches; 0 where unknown."""
    sessions: int = 0
    price: float = 0.0
    """Per token and block, in the swarm's own unit."""
    follows: bool = False
    """Whether it takes the range that the orchestrator plans for it."""
    draw: bytes = b""
    """Its lot in the election of the orchestrator (swarm.election); empty if it does not stand."""
    links: tuple[LinkRecord, ...] = ()
    quant: str = "none"
    """What it keeps weights in, and keys and values: as they are computed with (`none`), or in fewer bits."""
    kv: str = "none"
    baseline_bytes: int = 0
    """What its process takes without blocks; 0 where unknown."""
    machine: bytes = b""
    """Names what it computes with: the same for all nodes that share it. Empty where that is unknown."""
    share: float = 1.0
    """How much of that it uses while it computes; 1: all."""

    @property
    def blocks(self) -> BlockRange:
        return BlockRange(self.start, self.end)

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        """Every range it serves, the one it is meant to keep first."""
        return (self.blocks, *(BlockRange(start, end) for start, end in self.others))
