"""What an operator decides about a gateway."""

from __future__ import annotations

from dataclasses import dataclass

from bsns.gateway.keys import KeyRing


@dataclass(frozen=True, slots=True)
class Settings:
    """`keys`: None lets everybody in. `local_only`: only by this machine's own names (gate.py)."""

    keys: KeyRing | None = None
    most_body_bytes: int = 4 << 20
    local_only: bool = False
    stalled_s: float = 30.0
    """A client that takes nothing of its stream for so long is given up."""
