"""Simulated clients: the real generator and view, which ask one answer after the other and check every token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from bsns.client.generate import Generator
from bsns.client.reader import CHUNK_ROWS
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.node.peer import Peer
from bsns.node.view import View
from bsns.routing.chain import Route, Wish
from bsns.simulator.clock import Machine, OwnClock, Process
from bsns.simulator.model import DTYPE, VOCABULARY, HashEnds, expected_tokens
from bsns.simulator.nodes import MODEL, Swarm

HANGS_S = 5.0
"""How much longer than its deadline an answer may say nothing: what is later than that hangs."""


@dataclass(slots=True)
class Told:
    """One answer, as its user saw it. Times in seconds since the simulation began."""

    client: int
    asked_s: float
    prompt_tokens: int
    wanted: int
    seeded: bool
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: str | None = None
    """Its code."""
    message: str = ""
    ended_s: float = 0.0
    right: bool | None = None
    """Whether the tokens are those of an undisturbed run, as far as they go; None: not compared."""

    @property
    def silence_s(self) -> float:
        """The longest time in which nothing was heard."""
        moments = [self.asked_s, *self.times_s, self.ended_s]
        return max(after - before for before, after in pairwise(moments))

    @property
    def gap_s(self) -> float:
        """The longest time between two tokens; 0 without two."""
        return max((after - before for before, after in pairwise(self.times_s)), default=0.0)

    def problem(self, deadline_s: float) -> str | None:
        """What must never be."""
        if self.right is False:
            return "wrong tokens"
        if self.error is None and (self.finished != "length" or len(self.tokens) != self.wanted):
            return "an answer that looks complete and is not"
        moments = [self.asked_s, *self.times_s, self.ended_s]
        for number, (before, after) in enumerate(pairwise(moments)):
            if after - before > self.bound_s(deadline_s, number) + HANGS_S:
                return f"nothing was heard for {after - before:.1f} s"
        return None

    def bound_s(self, deadline_s: float, tokens: int) -> float:
        """How long a user who has heard so many tokens may hear nothing: for the first, a deadline for each chunk of
        the prompt, for it begins anew with each that comes through."""
        return deadline_s * (1 if tokens else -(-self.prompt_tokens // CHUNK_ROWS))


class _Letters:
    """Says each token as a letter."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(ord("0") + token) for token in token_ids)


class _Prompts:
    """What a Generator needs of client.prompts.Prompts, where prompts are tokens and none ends an answer."""

    tokenizer = _Letters()
    has_chat_template = False
    end_tokens: frozenset[int] = frozenset()


class SimulatedClient:
    """A client process."""

    def __init__(self, swarm: Swarm, machine: Machine) -> None:
        scenario = swarm.scenario
        self.swarm = swarm
        self.peer: Peer = swarm.peer(OwnClock(swarm.loop))
        clients = scenario.clients
        process = Process(machine)
        if clients.machine:
            swarm.network.processes[self.peer.id] = process

        def cost(rows: int) -> None:
            swarm.loop.spend(process, (clients.turn_ms + clients.row_ms * (rows - 1)) / 1e3)

        wish = Wish(aim=clients.objective, hop_bytes=scenario.model.hidden_bytes)
        self.view = View(
            self.peer.directory,
            MODEL,
            DTYPE,
            scenario.model.blocks,
            wish=wish,
            clock=swarm.loop,
            key=swarm.rng.getrandbits(32),
        )
        self.generator = Generator(
            HashEnds(cost),  # type: ignore[arg-type]
            _Prompts(),  # type: ignore[arg-type]
            self.peer.dial,
            self._find_route,
            model=MODEL,
            dtype=DTYPE,
            context_tokens=scenario.model.context_tokens,
            deadline_s=clients.deadline_s,
            release=self.view.release,
            blame=self.view.blame,
            clock=swarm.loop,
            short_turn_s=0.0,
            warm_spares=clients.warm_spares,
        )

    async def _find_route(
        self, needed_tokens: int, avoid: Collection[PeerId], blocks: BlockRange | None, fresh: bool
    ) -> Route:
        return await self.view.route(self.generator.links, needed_tokens, avoid, blocks, fresh)

    async def ask(self, rng: random.Random, told: Told) -> None:
        """Ask for one answer, and note what comes. One that hangs is given up: its silence is the problem."""
        loop, scenario = self.swarm.loop, self.swarm.scenario
        prompt = [rng.randrange(VOCABULARY) for _ in range(told.prompt_tokens)]
        options = SamplingOptions(max_tokens=told.wanted)
        if told.seeded:
            options = replace(options, temperature=0.8, top_p=0.95, seed=rng.randrange(2**31))
        checked = rng.random() < scenario.verify
        pieces = self.generator.stream(prompt, options)
        try:
            while told.finished is None:
                bound_s = told.bound_s(scenario.clients.deadline_s, len(told.times_s))
                async with asyncio.timeout(bound_s + HANGS_S + 1.0):
                    piece = await anext(pieces)
                told.times_s.append(loop.time())
                if piece.token is not None:
                    told.tokens.append(piece.token)
                told.finished = piece.finished
        except BsnsError as error:
            told.error, told.message = error.code, error.message
        except (TimeoutError, StopAsyncIteration):
            pass
        finally:
            await pieces.aclose()
        told.ended_s = loop.time()
        if checked:
            told.right = _begins(expected_tokens(prompt, options, scenario.model.blocks), told.tokens)

    async def close(self) -> None:
        await self.generator.close()
        await self.peer.close()


def _begins(whole: Sequence[int], part: Sequence[int]) -> bool:
    return list(whole[: len(part)]) == list(part)


async def keep_asking(
    client: SimulatedClient, number: int, rng: random.Random, until_s: float, answers: list[Told]
) -> None:
    """One user: answer after answer until the simulation's end; the last is heard out."""
    swarm = client.swarm
    clients = swarm.scenario.clients
    await asyncio.sleep(rng.random() * min(1.0, until_s / 10))
    while swarm.loop.time() < until_s:
        told = Told(
            number,
            swarm.loop.time(),
            rng.randint(*clients.prompt_tokens),
            rng.randint(*clients.answer_tokens),
            rng.random() < clients.seeded,
        )
        answers.append(told)
        await client.ask(rng, told)
        if told.error is not None:
            await asyncio.sleep(1.0)  # as somebody does who has been refused
        if clients.think_s:
            await asyncio.sleep(rng.expovariate(1 / clients.think_s))
