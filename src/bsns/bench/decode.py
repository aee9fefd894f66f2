"""`bsns bench decode`: what cutting a model across processes costs, and what batching gains.

All rows use the same weights, dtype and threads, and take turns, round after round, so that a drifting machine drifts
for all of them; what is reported are medians over the rounds. Speeds are decoding speeds: tokens after the first, over
the time from the first to the last.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bsns.bench.machine import cpu_name
from bsns.bench.pipes import PipeLine
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions, sample
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.model.source import ModelSource, resolve
from bsns.model.stage import quiet_library
from bsns.model.tensors import to_memory, to_tensor
from bsns.node.alone import Alone
from bsns.node.client import Client
from bsns.node.ends import load_ends
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split

PROMPT = "Write a long story about a lighthouse keeper and the sea, with many details."
STREAMS = (1, 4, 16, 32)
PROMPT_TOKENS = (16, 512)

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: the seconds at which its tokens came, and the tokens."""

    times_s: list[float]
    tokens: list[int]

    @property
    def tokens_per_s(self) -> float:
        return (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])


@dataclass(slots=True)
class Samples:
    """What the rounds measured, before medians are taken."""

    single: dict[str, list[float]] = field(default_factory=dict)
    streams: dict[int, list[float]] = field(default_factory=dict)
    ttft_ms: dict[int, list[float]] = field(default_factory=dict)
    hop_ms: list[float] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=dict)


async def bench_decode(model: str, *, dtype: str, threads: int, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    torch.set_num_threads(threads)
    rounds, tokens = (2, 24) if quick else (7, 64)
    told("looking at the model")
    source = await asyncio.to_thread(resolve, model)
    samples = Samples()
    async with AsyncExitStack() as stack:
        swarms: dict[str, Client] = {}
        rss: dict[str, Any] = {"baseline": await asyncio.to_thread(_baseline_rss_mb)}
        for stages in (2, 3):
            told(f"starting {stages} nodes")
            ranges = equal_split(source.block_count, stages)
            swarm = await stack.enter_async_context(LocalSwarm(model, ranges, dtype=dtype, threads=threads))
            client = Client.on(swarm.peer, source, dtype=dtype, threads=threads, speculate=False, keep_sessions=0)
            swarms[f"swarm{stages}"] = await stack.enter_async_context(client)
        told("loading the model library's own model and our engine in one process")
        library = await asyncio.to_thread(Library, source, dtype)
        engine = await asyncio.to_thread(Engine, source, dtype, threads)
        pipes = {}
        for stages in (2, 3):
            line = PipeLine(
                source, equal_split(source.block_count, stages), dtype=dtype, threads=threads, ends=engine.ends
            )
            stack.callback(line.close)
            pipes[f"pipes{stages}"] = line
        prompt = swarms["swarm2"].tokens(PROMPT)
        answers: dict[str, Callable[[], Awaitable[Run]]] = {
            "hf": lambda: asyncio.to_thread(library.answer, prompt, tokens),
            "engine": lambda: asyncio.to_thread(engine.answer, prompt, tokens),
            "swarm2": lambda: _answer(swarms["swarm2"], prompt, tokens, samples),
            "swarm3": lambda: _answer(swarms["swarm3"], prompt, tokens, None),
        }
        load_before = os.getloadavg()[0]
        for number in range(rounds + 1):
            told(f"round {number} of {rounds}" if number else "warming up")
            kept = samples if number else Samples()
            if number == 1:
                samples.hop_ms.clear()
            for name, answer in answers.items():
                run = await answer()
                kept.single.setdefault(name, []).append(run.tokens_per_s)
                kept.texts[name] = run.tokens
            for name, line in pipes.items():
                speed = await asyncio.to_thread(line.tokens_per_s, prompt, tokens)
                kept.single.setdefault(name, []).append(speed)
            for count in STREAMS:
                kept.streams.setdefault(count, []).append(await _streams(swarms["swarm2"], prompt, tokens, count))
            for length in PROMPT_TOKENS:
                kept.ttft_ms.setdefault(length, []).append(await _ttft_ms(swarms["swarm2"], prompt, length))
        for name, client in swarms.items():
            rss[name] = [round(node.now.rss_bytes / 1e6) for node in await client.status() if node.now]
        return _report(
            source,
            samples,
            rss,
            executor=engine.name,
            dtype=dtype,
            threads=threads,
            rounds=rounds,
            load_before=load_before,
        )


class Library:
    """The model library's own `generate`, as its users call it."""

    def __init__(self, source: ModelSource, dtype: str) -> None:
        with quiet_library():
            self._model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True).eval()

    @torch.inference_mode()
    def answer(self, prompt: list[int], tokens: int) -> Run:
        clock = _Clock()
        ids = torch.tensor([prompt])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, streamer=clock
        )
        return Run(clock.times_s, output[0, len(prompt) :].tolist())


class _Clock:
    """Notes when each token comes; the library hands a streamer the prompt first."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._prompt_seen = False

    def put(self, _: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times_s.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        return None


class Engine:
    """Our engine with the whole model in one process and no network, on the executor that a node takes."""

    def __init__(self, source: ModelSource, dtype: str, threads: int) -> None:
        self._alone = Alone(source, BlockRange(0, source.block_count), dtype=dtype, threads=threads)
        self.ends = load_ends(source, dtype=dtype, threads=threads)
        self.name = self._alone.name
        self._dtype = dtype

    def answer(self, prompt: list[int], tokens: int) -> Run:
        self._alone.open(0, len(prompt) + tokens)
        history, options = list(prompt), SamplingOptions()
        times_s: list[float] = []
        step = prompt
        while len(times_s) < tokens:
            position = len(history) - len(step)
            hidden = to_memory(self.ends.embed(torch.tensor(step), torch.arange(position, len(history))))
            (output,) = self._alone.run([(0, position, len(step), hidden)])
            last = to_tensor(output[-(len(output) // len(step)) :], self._dtype, (1, self.ends.hidden_size))
            token = sample(self.ends.logits(last)[0], history, options, len(history))
            times_s.append(time.perf_counter())
            history.append(token)
            step = [token]
        return Run(times_s, history[len(prompt) :])


async def _answer(client: Client, prompt: list[int], tokens: int, samples: Samples | None) -> Run:
    stats, times_s, answer = Stats(), [], []
    async for piece in client.generator.stream(prompt, SamplingOptions(max_tokens=tokens), stats):
        times_s.append(time.perf_counter())
        answer.append(piece.token)
    if len(answer) != tokens:
        raise BadOption(f"the model ended its answer after {len(answer)} tokens; this benchmark needs {tokens}")
    if samples is not None:
        samples.hop_ms.extend(stats.own_ms_per_hop())
    return Run(times_s, [token for token in answer if token is not None])


async def _streams(client: Client, prompt: list[int], tokens: int, count: int) -> float:
    """Tokens per second of all streams together, while all of them are decoding."""
    runs = await asyncio.gather(*(_answer(client, prompt, tokens, None) for _ in range(count)))
    begin = max(run.times_s[0] for run in runs)
    end = min(run.times_s[-1] for run in runs)
    inside = sum(begin < at <= end for run in runs for at in run.times_s)
    return inside / (end - begin)


async def _ttft_ms(client: Client, prompt: list[int], length: int) -> float:
    """Time to the first token of a prompt of `length` tokens."""
    long_enough = (prompt * (length // len(prompt) + 1))[:length]
    stats = Stats()
    async for _ in client.generator.stream(long_enough, SamplingOptions(max_tokens=1), stats):
        pass
    return stats.ttft_ms


def _baseline_rss_mb() -> int:
    """What a node process takes before it has a model: interpreter and libraries."""
    code = "import bsns.node.server as s, bsns.transport.libp2p, bsns.swarm.hivemind_directory; print(s.rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return round(int(done.stdout) / 1e6)


def _report(
    source: ModelSource,
    samples: Samples,
    rss: dict[str, Any],
    *,
    executor: str,
    dtype: str,
    threads: int,
    rounds: int,
    load_before: float,
) -> dict[str, Any]:
    single = {name: statistics.median(values) for name, values in samples.single.items()}
    streams = {count: statistics.median(values) for count, values in samples.streams.items()}
    hops = sorted(samples.hop_ms)
    return {
        "single": {name: round(value, 2) for name, value in single.items()},
        "streams": {str(count): round(value, 2) for count, value in streams.items()},
        "hop_ms": {"p50": round(statistics.median(hops), 3), "p99": round(hops[int(0.99 * (len(hops) - 1))], 3)},
        "ttft_ms": {str(n): round(statistics.median(values), 1) for n, values in samples.ttft_ms.items()},
        "rss_mb": rss,
        "ratios": {
            "engine/hf": round(single["engine"] / single["hf"], 3),
            "swarm2/engine": round(single["swarm2"] / single["engine"], 3),
            "swarm3/engine": round(single["swarm3"] / single["engine"], 3),
            "swarm2/pipes2": round(single["swarm2"] / single["pipes2"], 3),
            "swarm3/pipes3": round(single["swarm3"] / single["pipes3"], 3),
            "streams.16/streams.1": round(streams[16] / streams[1], 2),
        },
        "spread": {name: [round(min(v), 2), round(max(v), 2)] for name, v in samples.single.items()},
        "same_tokens": {name: tokens == samples.texts["engine"] for name, tokens in samples.texts.items()},
        "model": {"name": source.name, "weight_mb": round(source.weight_bytes / 1e6), "blocks": source.block_count},
        "executor": executor,
        "dtype": dtype,
        "threads": threads,
        "rounds": rounds,
        "load_before": round(load_before, 2),
        "cpu": cpu_name(),
    }
