"""What a node announces about itself in the swarm's directory."""

from __future__ import annotations

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId
from bsns.protocol.membership import Certificate


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

    @property
    def blocks(self) -> BlockRange:
        return BlockRange(self.start, self.end)


class SignedRecord(msgspec.Struct, frozen=True, array_like=True):
    """An encoded NodeRecord with its author's signature (by the key inside its peer id) and certificate."""

    payload: bytes
    signature: bytes
    certificate: Certificate | None
