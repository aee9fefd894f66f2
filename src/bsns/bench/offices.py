"""Offices: nodes that hold no stage of an answer, but that a swarm might be thought to hang on.

They are its orchestrator, and the node by which all others joined, its bootstrap. Both are struck while an answer runs
on others: that must not be disturbed. While they are gone a new node and a new client must be able to join, by an
invite that another member hands on, and somebody else must become the orchestrator.

The nodes that stand for orchestrator, and the founder, have no room for a session. Who founded a swarm is not what it
was when it is started again: so a founder is ended last of all, and once for each way of ending.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from bsns.bench.emulation import Network, hindrance
from bsns.bench.faults import CLIENT, CUT, Faults, homes
from bsns.bench.struck import Cell, Outcome, answer, is_freed, recomputed, rows_of, table, until_whole
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, PeerError, PeerTimedOut
from bsns.model.source import ModelSource
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.planning.joining import equal_split
from bsns.protocol.plans import PlanRecord

ORCHESTRATOR, BOOTSTRAP = "orchestrator", "bootstrap"
STAGES = 4
NODES = 1 + STAGES + 2
"""The founder, who is the first, the stages, and two that stand for orchestrator."""
LEASE_S = 3.0
NO_ROOM = ("--cache-tokens", "16")
FOUNDER = ("--blocks", "0:1", *NO_ROOM)
STANDING = ("--memory", "2GB", "--lease-s", str(LEASE_S), *NO_ROOM)
PROMPT = "Write a long story about a lighthouse keeper and the sea, with many details."
OPTIONS = SamplingOptions(max_tokens=96)
"""Long enough that another is elected meanwhile."""
NEW_TOKENS = 8
ELECTED_S = 60.0
LOOK_S = 0.05
ENDS_IT = ("kill", "leave")
"""Faults from which a founder does not come back."""

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Struck:
    """What came of one fault in an office."""

    cell: Cell
    joined: bool
    """Whether a new node and a new client could join meanwhile, and the client got the usual answer."""
    successor_s: float | None
    """After how long another was the orchestrator."""


async def bench_offices(model: str, source: ModelSource, *, quick: bool, dtype: str, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    cuts = [CUT] if hindrance() is None else []
    first = [(fault, ORCHESTRATOR) for fault in (["kill"] if quick else ["kill", "stop", "leave", *cuts])]
    first += [(fault, BOOTSTRAP) for fault in ([] if quick else ["stop", *cuts])]
    struck: dict[tuple[str, str], Struck] = {}
    usual_s: list[float] = []
    for last in ENDS_IT[: 1 if quick else len(ENDS_IT)]:
        told(f"starting {NODES} nodes, of which one founds the swarm and two stand for orchestrator")
        async with AsyncExitStack() as stack:
            network = stack.enter_context(Network(NODES + 2)) if cuts else None
            if network is not None:
                stack.enter_context(network.entered(CLIENT))
            bench = await Offices.open(stack, model, source, dtype, network)
            usual_s.append(bench.usual.gap_s)
            for fault, place in [*first, (last, BOOTSTRAP)]:
                struck[fault, place] = found = await bench.struck(fault, place, told)
                gap_ms = 1e3 * found.cell.gap_s
                told(f"{fault} {place}: {gap_ms:.0f} ms{'' if found.joined else ', and nobody could join'}")
        first = []
    return figures(struck) | {"undisturbed_gap_ms": {"offices": round(1e3 * max(usual_s), 1)}, "lease_s": LEASE_S}


def figures(struck: Mapping[tuple[str, str], Struck]) -> dict[str, Any]:
    """What came of it, given by fault and place, as figures by fault, then by place."""
    joined: dict[str, dict[str, bool]] = {}
    successor_s: dict[str, float | None] = {}
    for (fault, place), found in struck.items():
        joined.setdefault(fault, {})[place] = found.joined
        if place == ORCHESTRATOR:
            successor_s[fault] = found.successor_s if found.successor_s is None else round(found.successor_s, 2)
    cells = {where: found.cell for where, found in struck.items()}
    return {**table(cells), "joined": joined, "successor_s": successor_s}


class Offices:
    """A swarm whose stages hold no office."""

    def __init__(self, swarm: LocalSwarm, client: Client, model: str, places: list[Home], faults: Faults) -> None:
        self._swarm, self._client, self._model = swarm, client, model
        self._places = places
        self._faults = faults
        self._prompt = client.tokens(PROMPT)
        self.usual = Outcome([], 0.0, None, 0, 0, ())
        """The undisturbed answer."""

    @classmethod
    async def open(
        cls, stack: AsyncExitStack, model: str, source: ModelSource, dtype: str, network: Network | None
    ) -> Offices:
        """Start one that has an orchestrator, in the network if there is one; the stack ends it."""
        places = homes(network, NODES + 1) if network is not None else [Home()] * (NODES + 1)
        own_home = Home(network.address(CLIENT)) if network is not None else None
        stages = equal_split(source.block_count, STAGES)
        swarm = LocalSwarm(model, stages, dtype=dtype, homes=places, own_home=own_home, founder=FOUNDER)
        await stack.enter_async_context(swarm)
        client = await stack.enter_async_context(
            Client.on(swarm.peer, source, dtype=dtype, speculate=False, keep_sessions=0)
        )
        for blocks in equal_split(source.block_count, 2):
            words = ("--first-blocks", str(blocks), *STANDING)
            await swarm.add(blocks, words, home=places[len(swarm.processes)])
        bench = cls(swarm, client, model, places, Faults(swarm, network))
        await bench._orchestrator()
        await answer(client, bench._prompt, OPTIONS)  # warm
        bench.usual = await answer(client, bench._prompt, OPTIONS)
        return bench

    async def struck(self, fault: str, place: str, told: Told) -> Struck:
        """An answer while the holder of an office fails, and what others can do meanwhile."""
        members = self._swarm.members()
        lease = await self._orchestrator()
        number = members[lease.author] if place == ORCHESTRATOR else 0
        victims = {peer for peer, its in members.items() if its == number}
        before = await rows_of(self._client)
        electing: list[asyncio.Task[float]] = []

        def strike(_: Stats) -> None:
            self._faults.strike(fault, number)
            if place == ORCHESTRATOR:
                electing.append(asyncio.create_task(self._succession_s(lease)))

        outcome = await answer(self._client, self._prompt, OPTIONS, strike)
        if outcome.error:
            told(f"{fault} {place}: {outcome.error}")
        after = await rows_of(self._client)
        successor_s = None
        for task in electing:
            try:
                successor_s = await task
            except BsnsError as error:
                told(f"{fault} {place}: {error.message}")
        joined = await self._newcomers(f"{fault} {place}", told)
        freed = await is_freed(self._client)
        again = recomputed(before, after, outcome, victims, len(self._prompt))
        if place == ORCHESTRATOR or fault not in ENDS_IT:
            await self._faults.undo(fault, [number])
            await until_whole(self._client, self._swarm.members)
        same = outcome.tokens == self.usual.tokens
        return Struck(
            Cell(outcome.gap_s, same, freed, outcome.repairs, outcome.warm_repairs, again), joined, successor_s
        )

    async def _orchestrator(self, after: PlanRecord | None = None) -> PlanRecord:
        """The plan of whoever holds the lease: one that is good for a while, of a later term than `after`, by another.

        Raises PeerTimedOut if nobody comes to hold it.
        """
        members = self._swarm.members()
        give_up_s = time.monotonic() + ELECTED_S
        while time.monotonic() < give_up_s:
            try:
                plans = await self._swarm.peer.directory.plans()
            except PeerError:
                plans = []  # whoever keeps them may be the one that was struck
            latest = max(plans, key=lambda plan: plan.term, default=None)
            fresh = latest is not None and latest.author in members and latest.expires_s > time.time() + LEASE_S / 3
            if latest is not None and fresh:
                if after is None:
                    return latest
                if latest.term > after.term and latest.author != after.author:
                    return latest
            await asyncio.sleep(LOOK_S)
        raise PeerTimedOut(f"after {ELECTED_S:g} s nobody else is the orchestrator")

    async def _succession_s(self, lease: PlanRecord) -> float:
        """How long from now on until another is the orchestrator. Raises PeerTimedOut."""
        started_s = time.monotonic()
        await self._orchestrator(after=lease)
        return time.monotonic() - started_s

    async def _newcomers(self, cell: str, told: Told) -> bool:
        """Whether a node and a client that come now can join by what a stage hands on, and are of use."""
        invite = self._swarm.invite_of(1)
        number = None
        try:
            number = await self._swarm.add(BlockRange(0, 1), FOUNDER, home=self._places[NODES], invite=invite)
            async with Client(invite, self._model) as client:
                there = await rows_of(client)
                said = await answer(client, self._prompt, SamplingOptions(max_tokens=NEW_TOKENS))
            if said.error:
                told(f"{cell}: a new client: {said.error}")
            newcomers = {peer for peer, its in self._swarm.members().items() if its == number}
            return newcomers <= set(there) and said.tokens == self.usual.tokens[:NEW_TOKENS]
        except BsnsError as error:
            told(f"{cell}: joining: {type(error).__name__}: {error.message}")
            return False
        finally:
            if number is not None:
                await self._swarm.let_go(number)
