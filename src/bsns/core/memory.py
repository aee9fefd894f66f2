"""What a node's memory is taken by, as it can be reckoned without looking."""

from __future__ import annotations

import msgspec


class MemoryUse(msgspec.Struct, frozen=True):
    """In bytes. Of a node that runs, the sum of the first four should be what its process has resident."""

    baseline_bytes: int = 0
    """The process without blocks, measured before it loads any."""
    weight_bytes: int = 0
    kv_bytes: int = 0
    """Keys and values of the tokens that its sessions have come to."""
    journal_bytes: int = 0
    promised_bytes: int = 0
    """What keys, values and journals take once every token of cache that is promised is there."""

    @property
    def now_bytes(self) -> int:
        """What should be resident now."""
        return self.baseline_bytes + self.weight_bytes + self.kv_bytes + self.journal_bytes

    @property
    def full_bytes(self) -> int:
        """What should be resident once every promise is taken up."""
        return self.baseline_bytes + self.weight_bytes + self.promised_bytes
