"""`bsns bench soak`: many answers for a long time, over a swarm whose nodes come and go.

Four stages of two nodes each. The second node of a stage, drawn by lot, is asked to leave or is killed, and started
anew after a while; then it is another's turn. The first nodes stay, so that no block is ever without a holder, and so
that there are processes old enough to see whether they grow. Meanwhile streams answer without a pause. Each answer has
to be the undisturbed one, or end with a typed error.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from bsns.bench.struck import is_freed, until_whole
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import missing_blocks
from bsns.core.errors import BsnsError
from bsns.model.source import resolve
from bsns.node.client import Client
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split

STAGES = 4
CHURN_S = 20.0
"""How often a node comes or goes."""
LOOK_S = 1.0
WARM_S = 300.0
WARM_SHARE = 0.25
"""What counts as warm-up, at the most, and of a shorter run."""
FLAT = 1.05
"""How much a process may grow after that."""
LENGTHS = (8, 24, 48, 96)
PROMPTS = (
    "Hi",
    "Write a long story about a lighthouse keeper and the sea, with many details.",
    "Name three rivers. " * 20,
)
EXACT = "float32"
"""Where answers are compared: elsewhere a replay rounds differently."""

Told = Callable[[str], None]
Sample = tuple[float, int]
"""Seconds since the beginning, and bytes."""


@dataclass(frozen=True, slots=True)
class Job:
    """One kind of answer."""

    prompt: tuple[int, ...]
    options: SamplingOptions


@dataclass(slots=True)
class Tally:
    """What came of the answers so far."""

    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    truncated: int = 0
    untyped: int = 0
    """Ended by something that is no error of ours."""
    errors: Counter[str] = field(default_factory=Counter)
    gap_s: float = 0.0

    def count(self, said: Sequence[int], finished: bool, usual: Sequence[int], *, exact: bool) -> None:
        """An answer that ended without an error: `finished` says whether it said that it was done."""
        self.answers += 1
        if not finished or (exact and len(said) < len(usual) and said == usual[: len(said)]):
            self.truncated += 1
        elif exact and list(said) != list(usual):
            self.wrong += 1


def growth(samples: Sequence[Sample], warm_s: float) -> tuple[float, float]:
    """A process's usual size early and late: medians over the first and the last fifth of what comes after `warm_s`."""
    warm = [size for at_s, size in samples if at_s >= warm_s] or [size for _, size in samples]
    fifth = max(1, len(warm) // 5)
    return statistics.median(warm[:fifth]), statistics.median(warm[-fifth:])


def problems(figures: Mapping[str, Any]) -> list[str]:
    """What a soak must not have found, in words."""
    found = [f"{figures[name]} {name} answers" for name in ("wrong", "truncated", "untyped") if figures[name]]
    if not figures["answers"]:
        found.append("no answer at all")
    if not figures["freed"]:
        found.append("sessions that nobody freed")
    grown = [name for name, ratio in figures["rss_ratio"].items() if ratio > FLAT]
    return found + [f"{name} grew by more than {FLAT - 1:.0%}" for name in grown]


async def bench_soak(
    model: str, *, minutes: float, streams: int, seed: int, dtype: str, told: Told, churn_s: float = CHURN_S
) -> dict[str, Any]:
    """Soak and report; keys as in docs/benchmarks.md."""
    source = await asyncio.to_thread(resolve, model)
    ranges = [*equal_split(source.block_count, min(STAGES, source.block_count))] * 2
    load_before = os.getloadavg()[0]
    told(f"starting {len(ranges)} nodes")
    async with LocalSwarm(model, ranges, dtype=dtype) as swarm, Client.on(swarm.peer, source, dtype=dtype) as client:
        soak = Soak(swarm, client, random.Random(seed), exact=dtype == EXACT, churn_s=churn_s, told=told)
        figures = await soak.run(60.0 * minutes, streams)
    found = problems(figures)
    return {
        **figures,
        "problems": found,
        "passed": not found,
        "model": source.name,
        "dtype": dtype,
        "streams": streams,
        "minutes": minutes,
        "load_before": round(load_before, 2),
    }


class Soak:
    """One swarm, its client, and what is done to them."""

    def __init__(
        self, swarm: LocalSwarm, client: Client, rng: random.Random, *, exact: bool, churn_s: float, told: Told
    ) -> None:
        self._swarm, self._client, self._rng = swarm, client, rng
        self._exact, self._churn_s, self._told = exact, churn_s, told
        self._stages = len(swarm.processes) // 2
        self._tally = Tally()
        self._usual: dict[Job, list[int]] = {}
        self._churn: Counter[str] = Counter()
        self._rss: dict[str, list[Sample]] = {}
        self._over = asyncio.Event()

    async def run(self, duration_s: float, streams: int) -> dict[str, Any]:
        """Answers, churn and a watch over memory, for so long; then what they have found."""
        jobs = [
            Job(tuple(self._client.tokens(prompt)), SamplingOptions(max_tokens=length, temperature=heat, seed=7))
            for prompt in PROMPTS
            for length in LENGTHS
            for heat in (0.0, 0.8)
        ]
        self._told(f"{len(jobs)} undisturbed answers, to compare with")
        for job in jobs:
            self._usual[job] = await self._say(job)
        self._told(f"{streams} streams for {duration_s / 60:g} minutes")
        repairs, started_s = self._client.generator.repairs, time.monotonic()
        self._tally = Tally()
        tasks = [asyncio.create_task(self._stream(jobs)) for _ in range(streams)]
        tasks += [asyncio.create_task(self._churning()), asyncio.create_task(self._watch(started_s))]
        try:
            await asyncio.wait(tasks, timeout=duration_s, return_when=asyncio.FIRST_EXCEPTION)
            self._over.set()
            took_s = time.monotonic() - started_s
            tokens_per_s = self._tally.tokens / took_s
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._told("the end")
        await until_whole(self._client, self._swarm.members)
        tally = self._tally
        sizes = {name: growth(samples, min(WARM_S, WARM_SHARE * took_s)) for name, samples in self._rss.items()}
        return {
            "answers": tally.answers,
            "wrong": tally.wrong,
            "truncated": tally.truncated,
            "untyped": tally.untyped,
            "errors": dict(tally.errors),
            "repairs": self._client.generator.repairs - repairs,
            "churn": dict(self._churn),
            "freed": await is_freed(self._client) and not self._client.generator.routes(),
            "rss_mb": {name: [round(early / 1e6, 1), round(late / 1e6, 1)] for name, (early, late) in sizes.items()},
            "rss_ratio": {name: round(late / early, 3) for name, (early, late) in sizes.items()},
            "gap_ms": round(1e3 * tally.gap_s, 1),
            "tokens_per_s": round(tokens_per_s, 2),
            "took_s": round(took_s),
        }

    async def _stream(self, jobs: Sequence[Job]) -> None:
        """One answer after the other until it is over."""
        while not self._over.is_set():
            job = self._rng.choice(jobs)
            try:
                await self._say(job)
            except BsnsError as error:
                self._tally.errors[error.code] += 1
                self._told(f"an answer ended with {error.code}: {error.message}")
            except Exception as error:  # noqa: BLE001  it is what is looked for
                self._tally.untyped += 1
                self._told(f"an answer ended with {error!r}")

    async def _say(self, job: Job) -> list[int]:
        """One answer, counted."""
        tally, usual = self._tally, self._usual.get(job)
        said: list[int] = []
        finished, before_s = False, 0.0
        async for piece in self._client.generator.stream(job.prompt, job.options):
            now_s = time.monotonic()
            tally.gap_s = max(tally.gap_s, now_s - before_s if said else 0.0)
            said.append(piece.token or 0)
            finished, before_s = piece.finished is not None, now_s
            tally.tokens += 1
        if usual is not None:
            wrong = tally.wrong
            tally.count(said, finished, usual, exact=self._exact)
            if tally.wrong > wrong:
                at = next(at for at, (one, other) in enumerate(zip(said, usual, strict=False)) if one != other)
                self._told(f"other tokens from number {at} of {len(usual)} on, after {len(job.prompt)} of a prompt")
        return said

    async def _churning(self) -> None:
        """A node goes, and comes again; the next one goes the other way."""
        ways = {"leave": signal.SIGTERM, "kill": signal.SIGKILL}
        while True:
            for way, signum in ways.items():
                number = self._stages + self._rng.randrange(self._stages)
                if await self._is_over_after(self._churn_s):
                    return
                if not await self._is_covered_without(number):
                    self._told(f"node {number + 1} stays: nobody else holds what it holds")
                    continue
                self._told(f"{way} node {number + 1}")
                self._churn[way] += 1
                await self._swarm.let_go(number, signum)
                over = await self._is_over_after(self._churn_s)
                await self._swarm.restart(number)
                self._churn["join"] += 1
                self._told(f"node {number + 1} is back; {self._tally.answers} answers so far")
                if over:
                    return

    async def _is_covered_without(self, number: int) -> bool:
        """Whether the others that answer hold every block."""
        members = self._swarm.members()
        others = [
            blocks
            for node in await self._client.status()
            if node.now is not None and members.get(node.record.peer, number) != number
            for blocks in node.record.ranges
        ]
        return not missing_blocks(others, self._client.source.block_count)

    async def _is_over_after(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            return False
        return True

    async def _watch(self, started_s: float) -> None:
        """The size of this process and of the nodes that stay, again and again."""
        watched = {"client": psutil.Process()}
        for number in range(self._stages):
            watched[f"node {number + 1}"] = psutil.Process(self._swarm.processes[number].pid)
        while not await self._is_over_after(LOOK_S):
            for name, process in watched.items():
                self._rss.setdefault(name, []).append((time.monotonic() - started_s, process.memory_info().rss))
