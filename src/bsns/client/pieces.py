"""What a stream yields, piece by piece, and what an answer cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from bsns.client.sampling import Logprobs
from bsns.protocol.inference import Passed
from bsns.routing.chain import Route


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream yields: new text, and with the last piece why it ended (`stop` or `length`)."""

    text: str
    token: int | None
    finished: str | None = None
    logprobs: Logprobs | None = None
    """Of the token, if the options ask for them."""


@dataclass(slots=True)
class Stats:
    """What one answer cost. Times in milliseconds; per-hop lists hold one entry per stage of the route."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's: those that its stages had from the answer before."""
    session: str = ""
    """The id under which the nodes' logs have it; empty until it is open."""
    tokens: int = 0
    ttft_ms: float = 0.0
    decode_s: float = 0.0
    """From the first token to the last."""
    route: Route = ()
    turns_ms: list[tuple[float, tuple[Passed, ...]]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, without the time to the first token; 0 for answers of a single token."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    def own_ms_per_hop(self) -> list[float]:
        """For each decoding step our own time per hop: everything between two turns but the stages' computing."""
        return [
            (total_ms - sum(hop.computing_ms for hop in hops)) / (len(hops) + 1)
            for total_ms, hops in self.turns_ms[1:]
            if hops
        ]
