"""`bsns bench survive`: answers over real processes that are killed, stopped, cut off, slowed down and made to lie.

Eight nodes of the model: four in a row, and a second one for each of their ranges. In every cell a long answer is
begun, the fault strikes after some tokens, and the answer is compared with the undisturbed one; the gap is the longest
time between two tokens. A node that was killed is started again before the next cell. Networks are cut in an emulated
one; bench.offices strikes nodes that hold no stage.

The last part is the table of Petals' paper (Borzunov et al. 2023, arXiv 2312.08361): steps per second where each step
fails with a given probability, here by cutting the client's stream to a stage drawn by lot.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from typing import Any

from bsns.bench import offices
from bsns.bench.emulation import Network, hindrance
from bsns.bench.faults import CLIENT, CUT, SIGNALS, Faults, homes
from bsns.bench.struck import STRIKES_AFTER, Cell, Outcome, answer, is_freed, recomputed, rows_of, table, until_whole
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerLost
from bsns.core.ids import PeerId
from bsns.model.source import ModelSource, resolve
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.planning.joining import equal_split
from bsns.worker.faults import VARIABLE

PROMPT = "Write a long story about a lighthouse keeper and the sea, with many details. "
STAGES = 4
HOLDERS = 2
"""Of every range. Spares that hold more would make shorter routes than those that are to be struck."""
TOKENS, QUICK_TOKENS = 48, 32
CONTEXT = 256
"""Tokens that the session holds when the fault strikes."""
DTYPE = "float32"
"""A replay computes in chunks what was computed token by token: in bfloat16 that rounds differently."""

PLACES: dict[str, Callable[[int], list[int]]] = {
    "first": lambda stages: [0],
    "middle": lambda stages: [stages // 2],
    "last": lambda stages: [stages - 1],
    "double": lambda stages: [0, stages - 1],
    "adjacent": lambda stages: [stages // 2 - 1, stages // 2],
}
WARM_FAULTS = ("kill", "garbage")
WARM_PLACES = ("first", "middle", "last", "double")
"""What is struck again where spares are kept warm."""
NAMES = {0.0: "0", 1e-4: "1e-4", 1e-3: "1e-3", 1e-2: "1e-2"}
GREEDY = SamplingOptions(max_tokens=TOKENS)
SEEDED = SamplingOptions(max_tokens=TOKENS, temperature=0.8, top_p=0.95, seed=11)
QUICK = SamplingOptions(max_tokens=QUICK_TOKENS)

Told = Callable[[str], None]


async def bench_survive(model: str, *, quick: bool, seed: int, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    started_s = time.monotonic()
    source = await asyncio.to_thread(resolve, model)
    os.environ[VARIABLE] = "1"
    load_before = os.getloadavg()[0]
    figures = await _bench(model, source, quick, seed, told)
    if (problem := hindrance()) is None:
        merge(figures, await _bench_cut(model, source, quick, told))
    else:
        told(f"no node's network is cut: {problem}")
    merge(figures, await offices.bench_offices(model, source, quick=quick, dtype=DTYPE, told=told))
    return {
        **figures,
        "left_out": {CUT: problem} if problem is not None else {},
        "model": source.name,
        "dtype": DTYPE,
        "quick": quick,
        "took_s": round(time.monotonic() - started_s),
        "load_before": round(load_before, 2),
    }


async def _bench(model: str, source: ModelSource, quick: bool, seed: int, told: Told) -> dict[str, Any]:
    """What signals do, and the rates."""
    ranges = ranges_of(source.block_count)
    told(f"starting {len(ranges)} nodes")
    async with (
        LocalSwarm(model, ranges, dtype=DTYPE) as swarm,
        Client.on(swarm.peer, source, dtype=DTYPE, speculate=False, keep_sessions=0) as client,
    ):
        bench = Bench(swarm, client)
        figures = await bench.cells(quick, told)
        figures |= await bench.rates(quick, seed, told)
        async with Client.on(
            swarm.peer, source, dtype=DTYPE, warm_spares=True, speculate=False, keep_sessions=0
        ) as client:
            told("the same with warm spares")
            figures["warm"] = await Bench(swarm, client).cells(quick, told, faults=WARM_FAULTS, places=WARM_PLACES)
        return figures


async def _bench_cut(model: str, source: ModelSource, quick: bool, told: Told) -> dict[str, Any]:
    """What a cut does, in an emulated network without delay."""
    ranges = ranges_of(source.block_count)
    told(f"starting {len(ranges)} nodes in an emulated network")
    with Network(len(ranges) + 1) as network, network.entered(CLIENT):
        async with AsyncExitStack() as stack:
            own_home, places = Home(network.address(CLIENT)), homes(network, len(ranges))
            swarm = LocalSwarm(model, ranges, dtype=DTYPE, homes=places, own_home=own_home)
            await stack.enter_async_context(swarm)
            client = await stack.enter_async_context(
                Client.on(swarm.peer, source, dtype=DTYPE, speculate=False, keep_sessions=0)
            )
            return await Bench(swarm, client, network).cells(quick, told, faults=(CUT,))


def ranges_of(block_count: int) -> list[BlockRange]:
    """What the nodes hold: the model in a row, as often as it has holders."""
    return [*equal_split(block_count, min(STAGES, block_count))] * HOLDERS


def merge(figures: dict[str, Any], more: dict[str, Any]) -> None:
    """Add figures to figures, where both have objects their entries."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(known := figures.get(key), dict):
            merge(known, value)
        else:
            figures[key] = value


class Bench:
    """One swarm and its client, under faults."""

    def __init__(self, swarm: LocalSwarm, client: Client, network: Network | None = None) -> None:
        self.swarm, self.client = swarm, client
        self._faults = Faults(swarm, network)
        text = client.tokens(PROMPT * 40)
        self.prompt = text[: CONTEXT - STRIKES_AFTER]

    async def cells(
        self,
        quick: bool,
        told: Told,
        *,
        faults: Sequence[str] = tuple(SIGNALS),
        places: Collection[str] = tuple(PLACES),
        sampling: Sequence[SamplingOptions] = (),
    ) -> dict[str, Any]:
        """Every fault in every place, under greedy and seeded sampling, or as `sampling` says."""
        sampling = sampling or ((QUICK,) if quick else (GREEDY, SEEDED))
        answers = [(options, await self._undisturbed(options)) for options in sampling]
        cells: dict[tuple[str, str], Cell] = {}
        for fault in faults:
            for place in places:
                cells[fault, place] = cell = await self._cell(fault, place, answers, told)
                told(f"{fault} {place}: {1e3 * cell.gap_s:.0f} ms{'' if cell.exact else ', other tokens'}")
        usual_ms = 1e3 * statistics.median(usual.gap_s for _, usual in answers)
        return {**table(cells), "undisturbed_gap_ms": {CUT if CUT in faults else "stages": round(usual_ms, 1)}}

    async def rates(self, quick: bool, seed: int, told: Told) -> dict[str, Any]:
        """Steps per second at several probabilities that a step fails."""
        tokens = 128 if quick else 1024
        probabilities = (0.0, 1e-2) if quick else tuple(NAMES)
        rate: dict[str, float] = {}
        failures: dict[str, int] = {}
        same: dict[str, bool] = {}
        reference: list[int] = []
        for probability in probabilities:
            name = NAMES[probability]
            told(f"{tokens} tokens at a failure rate of {name}")
            rng = random.Random(seed)
            times_s: list[float] = []
            said: list[int] = []
            stats = Stats()
            struck = 0
            options = SamplingOptions(max_tokens=tokens)
            prompt = self.prompt[:16]
            async for piece in self.client.generator.stream(prompt, options, stats):
                times_s.append(time.perf_counter())
                said.append(piece.token or 0)
                if rng.random() < probability and len(said) < tokens:
                    await self._cut_stream(rng)
                    struck += 1
            rate[name] = round((len(times_s) - 1) / (times_s[-1] - times_s[0]), 2)
            failures[name] = struck
            reference = reference or said
            same[name] = said == reference
        ratio = round(rate["1e-2"] / rate["0"], 3)
        return {"rate": rate, "rate_ratio": {"1e-2": ratio}, "rate_failures": failures, "rate_exact": same}

    async def _cell(
        self, fault: str, place: str, answers: Sequence[tuple[SamplingOptions, Outcome]], told: Told
    ) -> Cell:
        gap_s, exact, freed, repairs, warm, again = 0.0, True, True, 0, 0, 0
        for options, usual in answers:
            before = await rows_of(self.client)
            outcome, struck = await self._struck(fault, place, options)
            after = await rows_of(self.client)
            if outcome.error:
                told(f"{fault} {place}: {outcome.error}")
            gap_s, repairs = max(gap_s, outcome.gap_s), repairs + outcome.repairs
            warm += outcome.warm_repairs
            exact &= outcome.tokens == usual.tokens
            freed &= await is_freed(self.client)
            again = max(again, recomputed(before, after, outcome, struck, len(self.prompt)))
        return Cell(gap_s, exact, freed, repairs, warm, again)

    async def _cut_stream(self, rng: random.Random) -> None:
        """End the client's stream to a stage of its session, drawn by lot: the stage forgets the session."""
        route = self.client.generator.routes()[0]
        link = await self.client.generator.links.to(rng.choice(route))
        await link.give_up(PeerLost(f"the bench cut the stream to {link.peer}").about(link.peer))

    async def _undisturbed(self, options: SamplingOptions) -> Outcome:
        await answer(self.client, self.prompt, options)  # warm
        return await answer(self.client, self.prompt, options)

    async def _struck(self, fault: str, place: str, options: SamplingOptions) -> tuple[Outcome, set[PeerId]]:
        """An answer whose stages in this place fail, and who failed; the swarm is whole again."""
        members = self.swarm.members()
        struck: set[PeerId] = set()

        def strike(stats: Stats) -> None:
            for stage in PLACES[place](len(stats.route)):
                struck.add(stats.route[stage].peer)
            for peer in struck:
                self._faults.strike(fault, members[peer])

        outcome = await answer(self.client, self.prompt, options, strike)
        assert struck, f"the fault struck nobody: {outcome.error}"
        await self._faults.undo(fault, [members[peer] for peer in struck])
        await until_whole(self.client, self.swarm.members)
        return outcome, struck
