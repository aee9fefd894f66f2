"""Rivals: one model through two nodes of ours and through what others have, on this machine, in turns.

Part of `bsns bench serve`. A chain is two processes with half of the model each, and the cores are shared between
them; what computes alone has every core. For a single answer one of a chain's processes works at a time: therefore the
rows with `all_cores` in their names, whose processes have every core each, as on two machines. Nobody guesses: random
weights repeat themselves, and guesses would all be right.

Whoever is not installed, does not start or fails is left out with the reason, and the others go on; what was measured
in whole rounds before counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bsns.bench import llama_rpc
from bsns.bench.engine import LibraryRunner, shaped, speed
from bsns.bench.language_pipes import find_language_pipes, two_nodes
from bsns.bench.llama_cpp import Absent, Decode, LlamaCpp, find_llama_cpp
from bsns.bench.llama_gguf import checkpoint_gguf
from bsns.bench.load import gateway
from bsns.bench.spoken import spoken, text_of
from bsns.bench.timed import Api, api_rate, client_rate
from bsns.client.prompts import Prompts
from bsns.core.errors import BadOption, BsnsError
from bsns.model.source import ModelSource, cache_dir
from bsns.node.client import Client
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split

MODEL = "1.1b"
"""Of the shape, with random weights: large enough that computing is what counts."""
DTYPE = "bfloat16"
NODES = 2
STREAMS = (1, 16)
PROMPT_TOKENS = 96
"""Half an answer more is the context of 128 that llama.cpp and the library are measured at."""
START_DEADLINE_S = 420.0
ROUND_DEADLINE_S = 150.0
"""What one measurement may take, loading included."""
BUDGET_S = 840.0
CONNECTS_APART_S = 0.1
"""language-pipes' server lets five connections wait to be taken, and more at once are refused or come a second late."""

Told = Callable[[str], None]
Rate = Callable[[int], Awaitable[float]]
"""Tokens per second of so many streams together."""
Contender = Callable[[], AbstractAsyncContextManager[Rate]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all have in common. `spoken`: the same model with a tokenizer, if the source has none."""

    source: ModelSource
    spoken: ModelSource
    texts: tuple[str, ...]
    tokens: Mapping[int, int]
    """Of an answer, by how many there are at once."""
    api_seconds: float
    """After which answers of language-pipes are broken off."""
    node_threads: int
    cores: int
    scratch: Path
    kept: Path
    """The folder for what is made once."""


@dataclass(slots=True)
class Race:
    """What the rounds measured, and who is not there, and why."""

    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int = 0

    def report(self) -> dict[str, Any]:
        return {
            **{
                name: {f"tps_{n}": round(statistics.median(taken), 2) for n, taken in rates.items()}
                | {f"range_{n}": [round(min(taken), 2), round(max(taken), 2)] for n, taken in rates.items()}
                for name, rates in self.rates.items()
            },
            "ratio": {
                ours: {
                    theirs: {
                        f"tps_{n}": round(statistics.median(a / b for a, b in zip(taken, others[n], strict=False)), 2)
                        for n, taken in rates.items()
                    }
                    for theirs, others in self.rates.items()
                    if not theirs.startswith("bsns_")
                }
                for ours, rates in self.rates.items()
                if ours.startswith("bsns_")
            },
            "left_out": self.left_out,
            "rounds": self.rounds,
        }


async def race(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    told: Told,
    start_deadline_s: float = START_DEADLINE_S,
    round_deadline_s: float = ROUND_DEADLINE_S,
    budget_s: float = BUDGET_S,
) -> Race:
    """All are started, and take turns, round after round. Whoever fails is ended, and left out of what follows.

    No round is begun that would end after `budget_s`, if it took as long as the one before.
    """
    result, started_s = Race(), time.monotonic()
    async with AsyncExitStack() as all_of_them:
        running: dict[str, tuple[Rate, AsyncExitStack]] = {}

        async def drop(name: str, error: Exception) -> None:
            reason = str(error) or "it took too long; measure on a machine that does nothing else"
            result.left_out[name] = f"in round {result.rounds + 1}: {reason}" if result.rounds else reason
            for taken in result.rates.get(name, {}).values():
                del taken[result.rounds :]
            if not result.rounds:
                result.rates.pop(name, None)
            told(f"rivals: {name} is left out: {result.left_out[name]}")
            if name in running:
                await running.pop(name)[1].aclose()

        for name, contender in contenders.items():
            told(f"rivals: starting {name}")
            own = await all_of_them.enter_async_context(AsyncExitStack())
            try:
                async with asyncio.timeout(start_deadline_s):
                    running[name] = await own.enter_async_context(contender()), own
            except (BsnsError, TimeoutError) as error:
                await drop(name, error)
        for number in range(rounds):
            round_s = time.monotonic()
            for name, (rate, _) in list(running.items()):
                told(f"rivals: round {number + 1} of {rounds}, {name}")
                try:
                    for streams in STREAMS:
                        async with asyncio.timeout(round_deadline_s):
                            reached = await rate(streams)
                        result.rates.setdefault(name, {}).setdefault(streams, []).append(reached)
                except (BsnsError, TimeoutError) as error:
                    await drop(name, error)
            result.rounds, now_s = number + 1, time.monotonic()
            if now_s + (now_s - round_s) > started_s + budget_s:
                break
    return result


async def bench_rivals(model: str, *, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    kept = cache_dir() / "bench"
    await asyncio.to_thread(kept.mkdir, parents=True, exist_ok=True)
    told("rivals: preparing the model")
    cores = os.cpu_count() or 1
    threads_before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="bsns-rivals-") as scratch:
        setting = await asyncio.to_thread(_setting, model, kept, Path(scratch), cores, quick)
        llama = await asyncio.to_thread(find_llama_cpp, kept)
        torch.set_num_threads(setting.node_threads)
        try:
            found = await race(contenders_of(setting, llama), rounds=1 if quick else 3, told=told)
        finally:
            torch.set_num_threads(threads_before)
    return {
        "rivals": {
            **found.report(),
            "model": setting.source.name,
            "threads": {"node": setting.node_threads, "alone": cores},
            "llama_cpp_build": llama.reason if isinstance(llama, Absent) else llama.build,
        }
    }


def _setting(model: str, kept: Path, scratch: Path, cores: int, quick: bool) -> Setting:
    source = shaped(model, kept)
    speaking = spoken(source)
    prompts = Prompts(speaking.path)
    return Setting(
        source,
        speaking,
        tuple(text_of(prompts, PROMPT_TOKENS, number) for number in range(max(STREAMS))),
        tokens={1: 24, 16: 8} if quick else {1: 64, 16: 32},
        api_seconds=60.0 if quick else 90.0,
        node_threads=max(1, cores // NODES),
        cores=cores,
        scratch=scratch,
        kept=kept,
    )


def contenders_of(setting: Setting, llama: LlamaCpp | Absent) -> dict[str, Contender]:
    """Whom we run against ourselves, by the names of the report."""
    node, cores = setting.node_threads, setting.cores
    return {
        "bsns_int8": lambda: _ours(setting, "int8", node),
        "bsns_bf16": lambda: _ours(setting, "none", node),
        "bsns_int8_all_cores": lambda: _ours(setting, "int8", cores),
        "bsns_gateway": lambda: _our_gateway(setting, node),
        "llama_rpc": lambda: _llama(setting, llama, "q8_0", node, chain=True),
        "llama_rpc_all_cores": lambda: _llama(setting, llama, "q8_0", cores, chain=True),
        "llama_alone": lambda: _llama(setting, llama, "q8_0", cores),
        "llama_alone_bf16": lambda: _llama(setting, llama, "bfloat16", cores),
        "llama_alone_q4_0": lambda: _llama(setting, llama, "q4_0", cores),
        "library": lambda: _library(setting),
        "language_pipes": lambda: _language_pipes(setting),
    }


@contextlib.asynccontextmanager
async def _swarm(setting: Setting, quant: str, threads: int) -> AsyncIterator[LocalSwarm]:
    ranges = equal_split(setting.spoken.block_count, NODES)
    async with LocalSwarm(str(setting.spoken.path), ranges, dtype=DTYPE, quant=quant, threads=threads) as swarm:
        yield swarm


@contextlib.asynccontextmanager
async def _ours(setting: Setting, quant: str, threads: int) -> AsyncIterator[Rate]:
    """Two nodes, through a client in this process, which has the embedding and the head."""
    options = {"dtype": DTYPE, "threads": threads, "wire": "none", "speculate": False, "keep_sessions": 0}
    async with (
        _swarm(setting, quant, threads) as swarm,
        Client.on(swarm.peer, setting.spoken, **options) as client,
    ):

        async def rate(streams: int, tokens: int = 0) -> float:
            texts, tokens = setting.texts[:streams], tokens or setting.tokens[streams]
            return await client_rate(client, texts, tokens, seconds=ROUND_DEADLINE_S / 2)

        for streams in STREAMS:
            await rate(streams, 4)  # warms up
        yield rate


@contextlib.asynccontextmanager
async def _our_gateway(setting: Setting, threads: int) -> AsyncIterator[Rate]:
    """Two nodes with int8, through a gateway's OpenAI API. It guesses where that pays: at temperature 1 it does not."""
    model = str(setting.spoken.path)
    async with (
        _swarm(setting, "int8", threads) as swarm,
        gateway(model, swarm.peer.invite, "--wire", "none", "--threads", str(threads)) as (url, name),
    ):
        api = Api(f"{url}/v1", "none", name)

        async def rate(streams: int, tokens: int = 0) -> float:
            texts, tokens = setting.texts[:streams], tokens or setting.tokens[streams]
            return await api_rate(api, texts, tokens, seconds=ROUND_DEADLINE_S / 2, temperature=1.0)

        for streams in STREAMS:
            await rate(streams, 4)
        yield rate


@contextlib.asynccontextmanager
async def _llama(
    setting: Setting, llama: LlamaCpp | Absent, form: str, threads: int, *, chain: bool = False
) -> AsyncIterator[Rate]:
    """llama.cpp's own measuring program, without a server or sampling; over two RPC servers with `chain`."""
    if isinstance(llama, Absent):
        raise BadOption(llama.reason)
    program = llama_rpc.rpc_server(llama) if chain else None
    if isinstance(program, Absent):
        raise BadOption(program.reason)
    file = await asyncio.to_thread(checkpoint_gguf, setting.source.checkpoint, form, setting.kept)
    async with AsyncExitStack() as stack:
        servers: tuple[str, ...] = ()
        if program is not None:
            started = llama_rpc.rpc_servers(program, NODES, threads=threads, scratch=setting.scratch)
            servers = await stack.enter_async_context(started)

        async def rate(streams: int) -> float:
            return await llama_rpc.tokens_per_s(
                llama,
                file,
                Decode(streams),
                threads=threads,
                scratch=setting.scratch,
                deadline_s=ROUND_DEADLINE_S,
                servers=servers,
            )

        yield rate


@contextlib.asynccontextmanager
async def _library(setting: Setting) -> AsyncIterator[Rate]:
    """The model library's own model, in this process, with every core."""
    runner = await asyncio.to_thread(LibraryRunner, setting.source, "bf16")

    async def rate(streams: int) -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(setting.cores)
        try:
            return await asyncio.to_thread(speed, runner, Decode(streams), 2.0)
        finally:
            torch.set_num_threads(before)

    try:
        yield rate
    finally:
        runner.close()


@contextlib.asynccontextmanager
async def _language_pipes(setting: Setting) -> AsyncIterator[Rate]:
    """Its two nodes, through its OpenAI API."""
    found = await find_language_pipes(setting.scratch)
    if isinstance(found, Absent):
        raise BadOption(found.reason)
    folder = setting.kept / "language-pipes" / setting.spoken.path.name
    async with two_nodes(found, setting.spoken, folder, threads=setting.node_threads, scratch=setting.scratch) as api:

        async def rate(streams: int) -> float:
            # some tokens that are not counted: what was broken off has gone by then
            await api_rate(api, setting.texts[:1], 4, seconds=setting.api_seconds)
            tokens = min(setting.tokens[streams], 24 // min(streams, 3))
            texts, seconds = setting.texts[:streams], setting.api_seconds
            return await api_rate(api, texts, tokens, seconds=seconds, apart_s=CONNECTS_APART_S)

        yield rate
