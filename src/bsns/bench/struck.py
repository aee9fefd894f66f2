"""Struck answers: an answer under way when its nodes fail, and what that has cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BsnsError, PeerLost
from bsns.core.ids import PeerId
from bsns.node.client import Client

STRIKES_AFTER = 16
"""Tokens."""
FREED_S = 4.0
WHOLE_S = 60.0

Rows = Mapping[PeerId, int]
"""How many rows each node has computed since it began."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer: its tokens, the longest gap between two, and what it took."""

    tokens: list[int]
    gap_s: float
    error: str | None
    repairs: int
    warm_repairs: int
    """Those of them by a warm spare."""
    route: tuple[PeerId, ...]
    """The stages that it began on."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one fault in one place did, over one answer or several."""

    gap_s: float
    exact: bool
    freed: bool
    repairs: int
    warm_repairs: int
    recomputed: int
    """Tokens computed again, on all nodes together; of several answers the most."""


async def answer(
    client: Client, prompt: Sequence[int], options: SamplingOptions, strike: Callable[[Stats], None] | None = None
) -> Outcome:
    """An answer, during which `strike` is called once STRIKES_AFTER tokens are there."""
    times_s: list[float] = []
    tokens: list[int] = []
    stats, error = Stats(), None
    route: tuple[PeerId, ...] = ()
    generator = client.generator
    repairs, warm_repairs = generator.repairs, generator.warm_repairs
    try:
        async for piece in generator.stream(prompt, options, stats):
            times_s.append(time.perf_counter())
            tokens.append(piece.token or 0)
            route = route or tuple(hop.peer for hop in stats.route)
            if len(tokens) == STRIKES_AFTER and strike is not None:
                strike(stats)
    except BsnsError as failed:
        error = f"{type(failed).__name__}: {failed.message}"
    gaps_s = [after - before for before, after in pairwise(times_s)]
    made, warm = generator.repairs - repairs, generator.warm_repairs - warm_repairs
    return Outcome(tokens, max(gaps_s, default=0.0), error, made, warm, route)


def recomputed(before: Rows, after: Rows, outcome: Outcome, struck: Collection[PeerId], prompt: int) -> int:
    """The tokens that were computed a second time, from the rows of each node before and after an answer.

    A stage that was there from the beginning computes the prompt and every token but the last once; whoever took a
    struck one's place, every token since. What is above that was computed before, by somebody. The struck themselves
    do not count: what they computed is lost with them, or of no use.
    """
    once = prompt + len(outcome.tokens) - 1
    since = max(0, len(outcome.tokens) - 1 - STRIKES_AFTER)
    again = 0
    for peer, rows in after.items():
        if peer not in struck:
            needed = once if peer in outcome.route else since
            again += max(0, rows - before.get(peer, 0) - needed)
    return again


async def rows_of(client: Client) -> dict[PeerId, int]:
    """The rows of every node that answers."""
    return {node.record.peer: node.now.rows for node in await client.status() if node.now is not None}


async def is_freed(client: Client) -> bool:
    """Whether no node holds a session, soon after the last answer."""
    give_up_s = time.monotonic() + FREED_S
    while time.monotonic() < give_up_s:
        nodes = [node for node in await client.status() if node.now is not None]
        if not any(node.now.sessions for node in nodes if node.now is not None):
            return True
        await asyncio.sleep(0.2)
    return False


async def until_whole(client: Client, members: Callable[[], Collection[PeerId]]) -> None:
    """Wait until every member answers, and pass none of them over any more. Raises PeerLost, naming who is missing."""
    give_up_s = time.monotonic() + WHOLE_S
    answering: set[PeerId] = set()
    while time.monotonic() < give_up_s:
        answering = {node.record.peer for node in await client.status() if node.now is not None}
        if answering >= set(members()):
            client.forgive(answering)  # not those that were killed: their records have not expired yet
            return
        await asyncio.sleep(0.2)
    missing = ", ".join(sorted(set(members()) - answering))
    raise PeerLost(f"the swarm did not become whole again within {WHOLE_S:g} s: {missing} does not answer")


def table(cells: Mapping[tuple[str, str], Cell]) -> dict[str, Any]:
    """The figures of cells, given by fault and place: for each figure by fault, then by place."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for (fault, place), cell in cells.items():
        values: dict[str, Any] = {
            "gap_ms": round(1e3 * cell.gap_s, 1),
            "exact": cell.exact,
            "freed": cell.freed,
            "repairs": cell.repairs,
            "warm_repairs": cell.warm_repairs,
            "recomputed": cell.recomputed,
        }
        for name, value in values.items():
            figures.setdefault(name, {}).setdefault(fault, {})[place] = value
    return dict(figures)
