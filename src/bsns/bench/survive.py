"""`bsns bench survive`: answers over real processes that are killed, stopped, slowed down and made to lie.

Six nodes of the model, four in a row and two spares that hold half of it each. In every cell a long answer is begun,
the fault strikes after some tokens, and the answer is compared with the undisturbed one; the gap is the longest time
between two tokens. A node that was killed is started again before the next cell.

The second part is the table of Petals' paper (Borzunov et al. 2023, arXiv 2312.08361): steps per second where each step
fails with a given probability, here by cutting the client's stream to a stage drawn by lot.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bsns.client.generate import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, PeerLost
from bsns.core.ids import PeerId
from bsns.model.source import resolve
from bsns.node.client import Client
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split
from bsns.worker.faults import VARIABLE

PROMPT = "Write a long story about a lighthouse keeper and the sea, with many details. "
STAGES = 4
STRIKES_AFTER = 16
"""Tokens."""
TOKENS = 48
CONTEXT = 256
"""Tokens that the session holds when the fault strikes."""
FREED_S = 4.0
DTYPE = "float32"
"""A replay computes in chunks what was computed token by token: in bfloat16 that rounds differently."""

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "slow": signal.SIGUSR1,
    "garbage": signal.SIGUSR2,
    "leave": signal.SIGTERM,
}
UNDO = {"stop": signal.SIGCONT, "slow": signal.SIGUSR1, "garbage": signal.SIGUSR2}
PLACES: dict[str, Callable[[int], list[int]]] = {
    "first": lambda stages: [0],
    "middle": lambda stages: [stages // 2],
    "last": lambda stages: [stages - 1],
    "double": lambda stages: [0, stages - 1],
}
NAMES = {0.0: "0", 1e-4: "1e-4", 1e-3: "1e-3", 1e-2: "1e-2"}
GREEDY = SamplingOptions(max_tokens=TOKENS)
SEEDED = SamplingOptions(max_tokens=TOKENS, temperature=0.8, top_p=0.95, seed=11)

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer: its tokens, the longest gap between two, and what it took."""

    tokens: list[int]
    gap_s: float
    error: str | None
    repairs: int


async def bench_survive(model: str, *, quick: bool, seed: int, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    source = await asyncio.to_thread(resolve, model)
    ranges = [*equal_split(source.block_count, STAGES), *equal_split(source.block_count, 2)]
    os.environ[VARIABLE] = "1"
    load_before = os.getloadavg()[0]
    told(f"starting {len(ranges)} nodes")
    async with LocalSwarm(model, ranges, dtype=DTYPE) as swarm, Client.on(swarm.peer, source, dtype=DTYPE) as client:
        bench = Bench(swarm, client, ranges)
        cells = await bench.cells(quick, told)
        rate = await bench.rates(quick, seed, told)
    return {**cells, **rate, "model": source.name, "dtype": DTYPE, "quick": quick, "load_before": round(load_before, 2)}


class Bench:
    """One swarm and its client, under faults."""

    def __init__(self, swarm: LocalSwarm, client: Client, ranges: list[BlockRange]) -> None:
        self.swarm, self.client, self.ranges = swarm, client, ranges
        text = client.tokens(PROMPT * 40)
        self.prompt = text[: CONTEXT - STRIKES_AFTER]

    async def cells(self, quick: bool, told: Told) -> dict[str, Any]:
        """Every fault in every place, under greedy and seeded sampling."""
        gap_ms: dict[str, dict[str, float]] = {}
        exact: dict[str, dict[str, bool]] = {}
        freed: dict[str, dict[str, bool]] = {}
        repairs: dict[str, dict[str, int]] = {}
        usual = await self._undisturbed(GREEDY), await self._undisturbed(SEEDED)
        for fault in SIGNALS:
            for place in PLACES:
                told(f"{fault} the {place} stage")
                outcomes = []
                clean = True
                for options, reference in zip((GREEDY, SEEDED)[: 1 if quick else 2], usual, strict=False):
                    outcome = await self._struck(fault, place, options)
                    outcomes.append((outcome, outcome.tokens == reference.tokens))
                    clean &= await self._is_freed()
                gap_ms.setdefault(fault, {})[place] = round(1e3 * max(outcome.gap_s for outcome, _ in outcomes), 1)
                exact.setdefault(fault, {})[place] = all(same for _, same in outcomes)
                freed.setdefault(fault, {})[place] = clean
                repairs.setdefault(fault, {})[place] = sum(outcome.repairs for outcome, _ in outcomes)
                if problems := [outcome.error for outcome, _ in outcomes if outcome.error]:
                    told(f"{fault} {place}: {problems[0]}")
        usual_ms = 1e3 * statistics.median(outcome.gap_s for outcome in usual)
        return {
            "gap_ms": gap_ms,
            "exact": exact,
            "freed": freed,
            "repairs": repairs,
            "undisturbed_gap_ms": round(usual_ms, 1),
        }

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
                    await self._cut(rng)
                    struck += 1
            rate[name] = round((len(times_s) - 1) / (times_s[-1] - times_s[0]), 2)
            failures[name] = struck
            reference = reference or said
            same[name] = said == reference
        ratio = round(rate["1e-2"] / rate["0"], 3)
        return {"rate": rate, "rate_ratio": {"1e-2": ratio}, "rate_failures": failures, "rate_exact": same}

    async def _cut(self, rng: random.Random) -> None:
        """End the client's stream to a stage of its session, drawn by lot: the stage forgets the session."""
        route = self.client.generator.routes()[0]
        link = await self.client.generator.links.to(rng.choice(route))
        await link.give_up(PeerLost(f"the bench cut the stream to {link.peer}").about(link.peer))

    async def _undisturbed(self, options: SamplingOptions) -> Outcome:
        await self._answer(options, lambda stats: None)  # warm
        return await self._answer(options, lambda stats: None)

    async def _struck(self, fault: str, place: str, options: SamplingOptions) -> Outcome:
        """An answer whose stages in this place fail, and a swarm that is whole again."""
        numbers: list[int] = []
        numbers_of = await self._numbers()

        def strike(stats: Stats) -> None:
            for stage in PLACES[place](len(stats.route)):
                number = numbers_of[stats.route[stage].peer]
                self.swarm.processes[number].send_signal(SIGNALS[fault])
                numbers.append(number)

        outcome = await self._answer(options, strike)
        assert numbers, f"the fault struck nobody: {outcome.error}"
        for number in numbers:
            if fault in UNDO:
                self.swarm.processes[number].send_signal(UNDO[fault])
            else:
                await self.swarm.restart(number)
        await self._until_whole()
        return outcome

    async def _answer(self, options: SamplingOptions, strike: Callable[[Stats], None]) -> Outcome:
        times_s: list[float] = []
        tokens: list[int] = []
        stats = Stats()
        error = None
        repairs = self.client.generator.repairs
        try:
            async for piece in self.client.generator.stream(self.prompt, options, stats):
                times_s.append(time.perf_counter())
                tokens.append(piece.token or 0)
                if len(tokens) == STRIKES_AFTER:
                    strike(stats)
        except BsnsError as failed:
            error = f"{type(failed).__name__}: {failed.message}"
        gaps_s = [after - before for before, after in pairwise(times_s)]
        return Outcome(tokens, max(gaps_s, default=0.0), error, self.client.generator.repairs - repairs)

    async def _numbers(self) -> dict[PeerId, int]:
        """Which process is which peer."""
        return {
            node.record.peer: self.ranges.index(node.record.blocks)
            for node in await self.client.status()
            if node.now is not None
        }

    async def _is_freed(self) -> bool:
        """Whether no node holds a session, soon after the last answer."""
        give_up_s = time.monotonic() + FREED_S
        while time.monotonic() < give_up_s:
            nodes = [node for node in await self.client.status() if node.now is not None]
            if not any(node.now.sessions for node in nodes if node.now is not None):
                return True
            await asyncio.sleep(0.2)
        return False

    async def _until_whole(self) -> None:
        """Wait until every range has a node that answers, and nobody is passed over any more."""
        give_up_s = time.monotonic() + 60.0
        while time.monotonic() < give_up_s:
            answering = {node.record.blocks for node in await self.client.status() if node.now is not None}
            if answering >= set(self.ranges):
                self.client.forgive()
                return
            await asyncio.sleep(0.5)
        raise PeerLost("the swarm did not become whole again within 60 s")
