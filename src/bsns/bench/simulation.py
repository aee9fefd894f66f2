"""`bsns bench simulate`: what the simulator predicts for swarms of real processes on this machine, beside what they do.

A profile is measured first: the blocks' time by the rows of a batch, in a process that does nothing else, and the
client's turns; then what a hop costs beside its blocks, from one stream through the smaller swarm, of which nothing is
predicted therefore. With these numbers the simulator predicts both swarms at every number of streams. Real rounds take
turns, and medians count.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bsns.client.sampling import SamplingOptions, sample
from bsns.core.blocks import BlockRange
from bsns.model.ends import Ends
from bsns.model.source import ModelSource, resolve
from bsns.model.tensors import TORCH_DTYPES, to_memory
from bsns.node.alone import Alone
from bsns.node.client import Client
from bsns.node.ends import load_ends
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split
from bsns.protocol.tensors import DTYPE_BYTES
from bsns.simulator.report import report
from bsns.simulator.scenario import Clients, Model, Nodes, Scenario, Ways
from bsns.simulator.world import simulate as simulate_scenario

SWARMS = (3, 6)
STREAMS = (1, 4, 8)
ROWS = (1, 2, 4, 8)
ROUNDS = 3
PROMPT_TOKENS = 16
TOKENS = 64
SECONDS = 6.0
REPEATS = 15
DTYPE = "bfloat16"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Profile:
    """What simulated machines are made of. Milliseconds."""

    block_ms: float
    rows_per_block: float
    turn_ms: float
    row_ms: float
    overhead_ms: float = 0.0


async def bench_simulation(model: str, *, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    load_before = os.getloadavg()[0]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    source = await asyncio.to_thread(resolve, model)
    told("measuring blocks and turns")
    profile = await asyncio.to_thread(_profile, source)
    measured: dict[tuple[int, int], float] = {}
    for nodes in SWARMS:
        told(f"starting {nodes} nodes")
        ranges = equal_split(source.block_count, nodes)
        async with (
            LocalSwarm(model, ranges, dtype=DTYPE) as swarm,
            Client.on(swarm.peer, source, dtype=DTYPE, speculate=False, keep_sessions=0) as client,
        ):
            await _speed(client, 1, 2.0)  # warm
            speeds: dict[int, list[float]] = {streams: [] for streams in STREAMS}
            for turn in range(1 if quick else ROUNDS):
                for streams in STREAMS:
                    told(f"{nodes} nodes, {streams} streams, round {turn + 1}")
                    speeds[streams].append(await _speed(client, streams, SECONDS / 2 if quick else SECONDS))
            measured |= {(nodes, streams): statistics.median(found) for streams, found in speeds.items()}
    told("simulating")
    profile = replace(profile, overhead_ms=_overhead_ms(profile, measured[SWARMS[0], 1], source.block_count))
    rows = []
    for (nodes, streams), real in measured.items():
        scenario = _scenario(source, profile, nodes, streams)
        predicted = (await asyncio.to_thread(_simulated, scenario))["tokens_per_s"]
        rows.append(
            {
                "nodes": nodes,
                "streams": streams,
                "measured": round(real, 2),
                "predicted": round(predicted, 2),
                "error": round(predicted / real - 1, 4),
            }
        )
    return {
        "rows": rows,
        "error": {str(nodes): max(abs(row["error"]) for row in rows if row["nodes"] == nodes) for nodes in SWARMS},
        "profile": {name: round(getattr(profile, name), 4) for name in Profile.__slots__},
        "model": source.name,
        "dtype": DTYPE,
        "cores": CORES,
        "quick": quick,
        "load_before": round(load_before, 2),
    }


def _scenario(source: ModelSource, profile: Profile, nodes: int, streams: int) -> Scenario:
    return Scenario(
        name=f"{nodes} processes, {streams} streams",
        duration_s=20.0,
        verify=0.0,
        model=Model(
            blocks=source.block_count,
            hidden_bytes=source.hidden_size * DTYPE_BYTES[DTYPE],
            context_tokens=source.context_tokens,
        ),
        ways=Ways(round_trip_ms=0.1, mbit=10_000.0, directory_ms=1.0),
        nodes=tuple(
            Nodes(
                count=1,
                blocks=str(blocks),
                block_ms=profile.block_ms,
                rows_per_block=profile.rows_per_block,
                overhead_ms=profile.overhead_ms,
                machine="here",
                cores=CORES,
            )
            for blocks in equal_split(source.block_count, nodes)
        ),
        clients=Clients(
            count=streams,
            together=True,
            machine="here",
            prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS),
            answer_tokens=(TOKENS, TOKENS),
            turn_ms=profile.turn_ms,
            row_ms=profile.row_ms,
        ),
    )


def _simulated(scenario: Scenario) -> dict[str, Any]:
    return report(simulate_scenario(scenario))


async def _speed(client: Client, streams: int, seconds: float) -> float:
    """Tokens per second of so many users who ask without a pause, counted between the first and the last moment."""
    times_s: list[float] = []
    until_s = time.perf_counter() + seconds
    prompt = client.tokens("the sea and the lighthouse " * 8, raw=True)[:PROMPT_TOKENS]

    async def user() -> None:
        while time.perf_counter() < until_s:
            async for _ in client.generator.stream(prompt, SamplingOptions(max_tokens=TOKENS)):
                times_s.append(time.perf_counter())  # noqa: PERF401  when it comes, not when all have

    await asyncio.gather(*(user() for _ in range(streams)))
    return len(times_s) / (max(times_s) - min(times_s))


def _overhead_ms(profile: Profile, tokens_per_s: float, blocks: int) -> float:
    """What a hop costs beside its blocks, by what one stream's tokens take in the smaller swarm."""
    return max(0.0, 1e3 / tokens_per_s - profile.turn_ms - blocks * profile.block_ms) / SWARMS[0]


def _profile(source: ModelSource) -> Profile:
    blocks = BlockRange(0, max(1, source.block_count // SWARMS[0]))
    alone = Alone(source, blocks, dtype=DTYPE)
    times_ms = {rows: _batch_ms(alone, rows) / len(blocks) for rows in ROWS}
    further_ms = (times_ms[ROWS[-1]] - times_ms[1]) / (ROWS[-1] - 1)
    ends = load_ends(source, dtype=DTYPE)
    turn_ms, last_ms = _turn_ms(ends, 1), _turn_ms(ends, ROWS[-1])
    row_ms = max(0.0, last_ms - turn_ms) / (ROWS[-1] - 1)
    return Profile(times_ms[1], times_ms[1] / max(further_ms, 1e-3), turn_ms, row_ms)


def _batch_ms(alone: Alone, rows: int) -> float:
    """A batch of so many sessions, each with a row after a prompt."""

    def noise(rows: int) -> memoryview:
        return to_memory((torch.rand(rows, alone.hidden_size) - 0.5).to(TORCH_DTYPES[DTYPE]))

    for number in range(rows):
        alone.open(number, PROMPT_TOKENS + TOKENS)
        alone.run([(number, 0, PROMPT_TOKENS, noise(PROMPT_TOKENS))])
    inputs = [noise(1) for _ in range(rows)]
    times_s = []
    for at in range(PROMPT_TOKENS, PROMPT_TOKENS + REPEATS):
        began_s = time.perf_counter()
        alone.run([(number, at, 1, row) for number, row in enumerate(inputs)])
        times_s.append(time.perf_counter() - began_s)
    alone.close()
    return 1e3 * statistics.median(times_s)


def _turn_ms(ends: Ends, rows: int) -> float:
    """Head, choice and embedding of so many rows."""
    hidden_ND = torch.rand(rows, ends.hidden_size).to(ends.dtype)
    tokens_N = torch.zeros(rows, dtype=torch.long)
    options = SamplingOptions()
    times_s = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        for logits_V in ends.logits(hidden_ND):
            sample(logits_V, [], options, 0)
        ends.embed(tokens_N, tokens_N)
        times_s.append(time.perf_counter() - began_s)
    return 1e3 * statistics.median(times_s)
