"""Kept sessions (a prefix cache): what the stages hold of answers that have ended, for prompts that begin like them.

The next turn of a chat begins with the last one's prompt and answer. Its session is parked, not closed: the stages keep
the keys and values until somebody else needs their room, and only what is new has to be computed. A session belongs to
the client that opened it, and here to a tenant besides: nobody learns from an answer's speed what another has asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bsns.client.session import Session
from bsns.core.ids import PeerId

LEAST_COMMON = 32
"""Tokens that a prompt has in common with a kept session for it to be worth asking for."""
LEAST_SHARE = 0.5
"""And that share of what the session holds: the rest is lost to whoever goes on with it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A parked session, and what its stages hold."""

    session: Session
    tokens: tuple[int, ...]
    tenant: str


class KeptSessions:
    """The sessions that a client keeps, at most so many. Pure."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[Kept] = []
        """The oldest first."""

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, kept: Kept) -> list[Kept]:
        """Keep one more; those that are not kept any longer."""
        self._kept.append(kept)
        gone = self._kept[: max(0, len(self._kept) - self._most)]
        del self._kept[: len(gone)]
        return gone

    def take(self, tokens: Sequence[int], tenant: str) -> tuple[Kept, int] | None:
        """The session that holds most of how a prompt begins, and how many tokens that is; it is kept no longer."""
        best: tuple[Kept, int] | None = None
        for kept in self._kept:
            if kept.tenant != tenant:
                continue
            common = min(common_prefix(kept.tokens, tokens), len(tokens) - 1)  # the last one's output is wanted
            if common >= max(LEAST_COMMON, LEAST_SHARE * len(kept.tokens)) and (best is None or common >= best[1]):
                best = kept, common
        if best is not None:
            self._kept.remove(best[0])
        return best

    def lose(self, peer: PeerId) -> list[Kept]:
        """A node is gone: the sessions that had a stage there, which are kept no longer."""
        gone = [kept for kept in self._kept if any(hop.peer == peer for hop in kept.session.route)]
        self._kept = [kept for kept in self._kept if kept not in gone]
        return gone


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
