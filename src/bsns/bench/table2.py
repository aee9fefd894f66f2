"""The paper's Table 2: tokens per second of six nodes over three networks, by how many answers they give at once.

Part of `bsns bench serve`. Beside it stand the same six nodes over ways that take no time, and one process that
computes the whole model with every core: what is lost to the ways, and what the machine could do at all. The nodes
share this machine's cores, so that more answers at once gain little where one keeps the cores busy already.

Speculation is measured on a text to be repeated, where nearly all guesses are right, and on one whose tokens are drawn
at random, where none are.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch

from bsns.bench.emulation import Network, Way
from bsns.bench.faults import CLIENT, homes
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.model.ends import Ends
from bsns.model.source import ModelSource
from bsns.model.tensors import to_memory, to_tensor
from bsns.node.alone import Alone
from bsns.node.client import Client
from bsns.node.ends import load_ends
from bsns.node.local import Home, LocalSwarm
from bsns.planning.joining import equal_split

DTYPE = "bfloat16"
NODES = 6
BATCHES = (1, 4, 8, 16)
NETWORKS = {"1g5": (2.5e-3, 1e9), "100m5": (2.5e-3, 100e6), "100m100": (50e-3, 100e6)}
"""One way's delay in seconds, and its bits per second: 1 Gbit/s and 5 ms there and back, …"""
NONE = "none"
"""Ways that take no time."""
PROMPT = "Write a long story about a lighthouse keeper and the sea, with many details. It begins on day {}."
REPEATED = (
    "Repeat this text three times, word for word: The quick brown fox jumps over the lazy dog while the cat sleeps "
    "under the old oak tree near the river, and nobody in the village knows who painted the mill yellow last night."
)

Told = Callable[[str], None]


async def bench_table2(model: str, source: ModelSource, *, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. Needs an emulated network."""
    rounds, tokens = (1, 24) if quick else (3, 48)
    told("one process with the whole model")
    figures: dict[str, Any] = {"one_process": await asyncio.to_thread(_one_process, source, tokens)}
    told(f"starting {NODES} nodes in an emulated network")
    with Network(NODES + 1) as network, network.entered(CLIENT):
        async with AsyncExitStack() as stack:
            swarm = LocalSwarm(
                model,
                equal_split(source.block_count, NODES),
                dtype=DTYPE,
                homes=homes(network, NODES),
                own_home=Home(network.address(CLIENT)),
            )
            await stack.enter_async_context(swarm)
            plain, guessing = [
                await stack.enter_async_context(
                    Client.on(swarm.peer, source, dtype=DTYPE, wire="none", speculate=speculate, keep_sessions=0)
                )
                for speculate in (False, True)
            ]
            bench = _Bench(plain, guessing, tokens)
            for number in range(rounds):
                for name in (NONE, *NETWORKS):
                    delay_s, bits_per_s = NETWORKS.get(name, (0.0, float("inf")))
                    way = Way(delay_s, bits_per_s / 8)
                    network.shape({(a, b): way for a in range(NODES + 1) for b in range(NODES + 1) if a != b})
                    told(f"round {number + 1} of {rounds}: {name}")
                    await bench.round(name)
    return figures | bench.report(figures["one_process"])


class _Bench:
    """What was measured, over the rounds."""

    def __init__(self, plain: Client, guessing: Client, tokens: int) -> None:
        self._plain, self._guessing, self._tokens = plain, guessing, tokens
        self._rates: dict[tuple[str, int, bool], list[float]] = {}
        self._own_ms: dict[str, list[float]] = {}
        self._gains: dict[tuple[str, str], list[float]] = {}

    async def round(self, name: str) -> None:
        """Everything over the network as it is now, each with and without guesses in turn."""
        await _rate(self._plain, 1, 4)  # whoever was far away is asked anew how far
        for batch in BATCHES:
            for speculate, client in ((False, self._plain), (True, self._guessing)):
                rate, stats = await _rate(client, batch, self._tokens)
                self._rates.setdefault((name, batch, speculate), []).append(rate)
                if batch == 1 and not speculate:
                    self._own_ms.setdefault(name, []).append(statistics.median(stats[0].own_ms_per_hop()))
        for text, prompt, options in (
            ("repeated", REPEATED, SamplingOptions(max_tokens=4 * self._tokens)),
            ("random", PROMPT.format(1), SamplingOptions(max_tokens=self._tokens, temperature=4.0, seed=1)),
        ):
            speeds = [(await _answer(c, prompt, options)).tokens_per_s for c in (self._plain, self._guessing)]
            self._gains.setdefault((name, text), []).append(speeds[1] / speeds[0])

    def report(self, one_process: dict[str, float]) -> dict[str, Any]:
        medians = {key: statistics.median(rates) for key, rates in self._rates.items()}
        names = (NONE, *NETWORKS)

        def by_batch(name: str, *, speculate: bool) -> dict[str, float]:
            return {f"batch{batch}": round(medians[name, batch, speculate], 2) for batch in BATCHES}

        ceiling = one_process["batch8"] / one_process["batch1"]
        return {
            "table2": {
                **{name: by_batch(name, speculate=False) for name in names},
                "scaling_1g5": round(medians["1g5", 8, False] / medians["1g5", 1, False], 2),
                "of_no_network_1g5": {
                    f"batch{b}": round(medians["1g5", b, False] / medians[NONE, b, False], 3) for b in BATCHES
                },
                "scaling_one_process": round(ceiling, 2),
            },
            "table2_guessing": {name: by_batch(name, speculate=True) for name in names},
            "own_ms_per_hop": {name: round(statistics.median(times), 2) for name, times in self._own_ms.items()},
            "spec": {
                text: {name: round(statistics.median(self._gains[name, of]), 2) for name in names}
                for text, of in (("speedup", "repeated"), ("speedup_random", "random"))
            },
        }


async def _answer(client: Client, prompt: str, options: SamplingOptions) -> Stats:
    stats = Stats()
    async for _ in client.stream(prompt, options, stats=stats):
        pass
    return stats


async def _rate(client: Client, count: int, tokens: int) -> tuple[float, list[Stats]]:
    """Tokens per second of so many answers together, while all of them are under way, and what each cost."""
    times_s: list[list[float]] = [[] for _ in range(count)]
    every = [Stats() for _ in range(count)]

    async def answer(number: int) -> None:
        options = SamplingOptions(max_tokens=tokens)
        async for _ in client.stream(PROMPT.format(number), options, stats=every[number]):
            times_s[number].append(time.perf_counter())

    await asyncio.gather(*(answer(number) for number in range(count)))
    begin, end = max(times[0] for times in times_s), min(times[-1] for times in times_s)
    inside = sum(begin < at <= end for times in times_s for at in times)
    return inside / (end - begin), every


def _one_process(source: ModelSource, tokens: int) -> dict[str, float]:
    """Tokens per second of this process with every core, blocks and head, by how many sequences it computes at once."""
    threads = os.cpu_count() or 1
    alone = Alone(source, BlockRange(0, source.block_count), dtype=DTYPE, threads=threads)
    ends = load_ends(source, dtype=DTYPE, threads=threads)
    rates = {}
    for batch in BATCHES:
        for number in range(batch):
            alone.open(number, 64 + tokens)
        _steps(alone, ends, batch, 0, 4)
        began_s = time.perf_counter()
        _steps(alone, ends, batch, 4, tokens)
        rates[f"batch{batch}"] = round(batch * tokens / (time.perf_counter() - began_s), 2)
        alone.close()
    return rates


def _steps(alone: Alone, ends: Ends, batch: int, first: int, count: int) -> None:
    tokens = list(range(100, 100 + batch))
    for position in range(first, first + count):
        hidden = to_memory(ends.embed(torch.tensor(tokens), torch.full((batch,), position)))
        row_bytes = hidden.nbytes // batch
        rows: Sequence[memoryview] = [hidden[n * row_bytes : (n + 1) * row_bytes] for n in range(batch)]
        outputs = alone.run([(number, position, 1, row) for number, row in enumerate(rows)])
        logits = ends.logits(to_tensor(b"".join(outputs), DTYPE, (batch, ends.hidden_size)))
        tokens = logits.argmax(-1).tolist()
