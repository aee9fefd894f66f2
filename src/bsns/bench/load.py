"""Load: many chats at once through a gateway, as OpenAI's own client sees them, and while nodes are killed.

Part of `bsns bench serve`. Four nodes, two for each half of the model, a gateway in a process of its own. Chats differ
in length; each is one that was answered undisturbed before, and what comes back has to be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bsns.core.errors import PeerFailed
from bsns.model.source import ModelSource
from bsns.node.local import LocalSwarm
from bsns.node.processes import Process, start
from bsns.planning.joining import equal_split

DTYPE = "bfloat16"
LEVELS = (1, 8, 32, 64)
MOST_CHATS = 64
KILL_EVERY_S = 60.0
QUESTIONS = (
    "Name three rivers.",
    "Write a long story about a lighthouse keeper and the sea, with many details.",
    "Say this again, word for word: " + "the mill by the river is old and yellow, and " * 12,
    "Here is a list of days: " + ", ".join(f"day {n}" for n in range(60)) + ". What follows the last of them?",
)
LENGTHS = (16, 48, 96)
DEADLINE_S = 120.0

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Chat:
    """One question, and how long its answer may be."""

    question: str
    length: int


CHATS = tuple(Chat(question, length) for question in QUESTIONS for length in LENGTHS)


@dataclass(slots=True)
class Tally:
    """What the chats of one measurement brought."""

    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    truncated: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """By HTTP status, or "stream" where one broke off with an error."""
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def report(self, took_s: float) -> dict[str, Any]:
        return {
            "tps": round(self.tokens / took_s, 1),
            "answers": self.answers,
            **{f"ttft_p{p}_ms": _percentile_ms(self.first_s, p) for p in (50, 95, 99)},
            **{f"itl_p{p}_ms": _percentile_ms(self.gaps_s, p) for p in (50, 95, 99)},
            "wrong": self.wrong,
            "truncated": self.truncated,
            "errors": dict(self.errors),
        }


async def bench_load(model: str, source: ModelSource, *, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. Needs the packages `openai` and those of the gateway."""
    halves = equal_split(source.block_count, 2)
    told("load: starting four nodes and a gateway")
    async with (
        LocalSwarm(model, [*halves, *halves], dtype=DTYPE) as swarm,
        # the same codec wherever an answer goes: with int8 on some ways its tokens would depend on the way
        gateway(model, swarm.peer.invite, "--wire", "none") as (url, name),
    ):
        bench = _Load(url, name, told)
        await bench.undisturbed()
        figures: dict[str, Any] = {}
        for chats in LEVELS:
            told(f"load: {chats} chats at once")
            figures[str(chats)] = await bench.run(chats, 8.0 if quick else 60.0)
        minutes, every_s = (0.5, 10.0) if quick else (10.0, KILL_EVERY_S)
        told(f"load: {MOST_CHATS} chats for {minutes:g} minutes, a node killed every {every_s:g} s")
        killing = asyncio.create_task(_kill(swarm, every_s, told))
        try:
            struck = await bench.run(MOST_CHATS, 60.0 * minutes)
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
        return {"load": figures, "killed": {"minutes": minutes, "kill_every_s": every_s, **struck}}


@contextlib.asynccontextmanager
async def gateway(model: str, invite: str, *words: str) -> AsyncIterator[tuple[str, str]]:
    """A gateway in a process of its own: where it listens, and the name of its model. Raises PeerFailed."""
    words = (model, "--join", invite, "--port", "0", "--json", *words)
    # a line for each request would drown how it goes
    process = await start("gateway", words, {"BSNS_LOG": "warning", **os.environ}, leashed=False)
    draining: asyncio.Task[None] | None = None
    try:
        listening = await _listening(process)
        draining = asyncio.create_task(_drain(process))
        yield listening
    finally:
        if draining is not None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


class _Load:
    """Chats through one gateway."""

    def __init__(self, url: str, model: str, told: Told) -> None:
        import openai  # of who measures, not of who serves

        self._api = openai
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S)
        self._model, self._told = model, told
        self._usual: dict[Chat, str] = {}

    async def undisturbed(self) -> None:
        """What every chat is answered while nobody else asks."""
        for chat in CHATS:
            text, finish = await self._say(chat, Tally())
            if finish is None:
                raise PeerFailed("the gateway did not finish an answer although nobody disturbed it")
            self._usual[chat] = text

    async def run(self, chats: int, seconds: float) -> dict[str, Any]:
        """So many chats at once, one after the other in each, for so long."""
        tally, started_s, turn = Tally(), time.monotonic(), itertools.cycle(CHATS)

        async def one() -> None:
            while time.monotonic() - started_s < seconds:
                await self._count(next(turn), tally)

        await asyncio.gather(*(one() for _ in range(chats)))
        return tally.report(time.monotonic() - started_s)

    async def _count(self, chat: Chat, tally: Tally) -> None:
        try:
            text, finish = await self._say(chat, tally)
        except self._api.APIStatusError as error:
            tally.errors[str(error.status_code)] += 1
            self._told(f"load: {error.status_code}: {error}")
            await asyncio.sleep(1.0)  # as Retry-After says
            return
        except self._api.APIError as error:
            tally.errors["stream"] += 1
            self._told(f"load: {error}")
            return
        tally.answers += 1
        usual = self._usual[chat]
        if finish is None or len(text) < len(usual):
            tally.truncated += 1
        elif text != usual:
            tally.wrong += 1

    async def _say(self, chat: Chat, tally: Tally) -> tuple[str, str | None]:
        """An answer's text and why it ended. Raises what OpenAI's client does."""
        asked_s = before_s = time.monotonic()
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": chat.question}],
            max_tokens=chat.length,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, finish, heard = "", None, False
        async for chunk in stream:
            if chunk.usage is not None:
                tally.tokens += chunk.usage.completion_tokens
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                if choice.delta.content:
                    now_s = time.monotonic()
                    (tally.gaps_s if heard else tally.first_s).append(now_s - (before_s if heard else asked_s))
                    text, heard, before_s = text + choice.delta.content, True, now_s
        return text, finish


async def _kill(swarm: LocalSwarm, every_s: float, told: Told) -> None:
    """Kill one node after the other, and start it again at once."""
    for number in itertools.cycle(range(len(swarm.processes))):
        await asyncio.sleep(every_s)
        told(f"load: killing node {number + 1}")
        await swarm.let_go(number, signal.SIGKILL)
        await swarm.restart(number)


async def _listening(gateway: Process) -> tuple[str, str]:
    """Where it listens, and the name of its model. Raises PeerFailed."""
    assert gateway.stdout is not None
    while line := await gateway.stdout.readline():
        match json.loads(line):
            case {"event": "listening", "url": str(url), "model": str(model)}:
                return url, model
            case {"event": "error", "message": str(message)}:
                raise PeerFailed(f"the gateway: {message}")
    raise PeerFailed("the gateway ended before it listened")


async def _drain(gateway: Process) -> None:
    """Read what else it says, so that it never waits for us."""
    assert gateway.stdout is not None
    while await gateway.stdout.read(1 << 16):
        pass


def _percentile_ms(times_s: Sequence[float], percent: int) -> float | None:
    if not times_s:
        return None
    if len(times_s) == 1:
        return round(1e3 * times_s[0], 1)
    return round(1e3 * statistics.quantiles(times_s, n=100, method="inclusive")[percent - 1], 1)
