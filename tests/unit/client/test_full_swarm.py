"""A full swarm: its room is used, refusals come in time and say what to do, and whoever keeps asking gets a turn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from memory_swarm import MODEL, MemorySwarm, StageShelf, answer, until
from running_time import running_s
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.opening import UNREACHED_S
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BsnsError, CacheFull, CacheTooSmall, PeerError, SwarmError
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Open
from bsns.transport.memory import MemoryNetwork, Pipe
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
OPTIONS = SamplingOptions(max_tokens=12)
PROMPT = prompt(4)
TOKENS = len(PROMPT) + OPTIONS.max_tokens
ROOM = 20
"""Sessions that each stage has room for."""
CLIENTS = 8
LATE_S = 1.5
"""What a refusal may take beside the time in which room is waited for: the tries themselves, on a busy machine."""


class JitteryNetwork(MemoryNetwork):
    """Frames take up to 20 ms, each another time: no two stages hear of many sessions in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self._rng = random.Random(1)
        self._free_s: dict[Pipe, float] = {}
        self._under_way: defaultdict[Pipe, deque[Callable[[], None]]] = defaultdict(deque)

    def carry(self, pipe: Pipe, data: bytes) -> None:
        self._send(pipe, partial(pipe.arrive, data))

    def carry_end(self, pipe: Pipe, lost: bool) -> None:
        self._send(pipe, partial(pipe.end, lost))

    def _send(self, pipe: Pipe, what: Callable[[], None]) -> None:
        """What is sent later arrives later, though timers of one millisecond go off in any order (uvloop's do)."""
        loop = asyncio.get_running_loop()
        self._free_s[pipe] = max(loop.time() + self._rng.uniform(0.0, 0.02), self._free_s.get(pipe, 0.0))
        self._under_way[pipe].append(what)
        loop.call_at(self._free_s[pipe], lambda: self._under_way[pipe].popleft()())


@dataclass
class Crowd:
    """What became of many answers that were asked for."""

    said: list[list[int]] = field(default_factory=list)
    refusals: list[tuple[BsnsError, float]] = field(default_factory=list)
    """With how long they took."""
    turns: Counter[str] = field(default_factory=Counter)


class Scene:
    """Three stages with room for `ROOM` sessions, and several clients."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm = swarm
        self.stages = shelf.stages(path, CUTS)
        self.ends = shelf.ends(path)
        self.killed: set[str] = set()
        self.crowd = Crowd()

    async def start(self, *more: str, room: int = ROOM) -> None:
        for name in ("a0", "a1", "a2", *more):
            await self.add(name, room)

    async def add(self, name: str, room: int) -> None:
        executor = TorchExecutor(self.stages[int(name[1])], dtype="float32")
        slow = 1e-3 if name[0] == "a" else 1.0  # far beyond what pings may differ
        await self.swarm.add_node(name, executor, block_count=CUTS[-1], cache_tokens=room * TOKENS, block_time_s=slow)

    def clients(self, count: int = CLIENTS, *, deadline_s: float = 20.0) -> list[Generator]:
        return [self.swarm.client(self.ends, deadline_s=deadline_s) for _ in range(count)]

    async def undisturbed(self) -> list[int]:
        said = await answer(self.swarm.client(self.ends), PROMPT, OPTIONS)
        await self.freed()
        return said

    async def ask(self, client: Generator, hold: asyncio.Event | None = None) -> bool:
        """One answer, which keeps its session after the first token until `hold`; False if it was refused."""
        started_s = running_s()
        stream = client.stream(PROMPT, OPTIONS)
        try:
            said = [(await anext(stream)).token]
            if hold is not None:
                await hold.wait()
            said += [piece.token async for piece in stream]
        except BsnsError as error:
            self.crowd.refusals.append((error, running_s() - started_s))
            return False
        self.crowd.said.append([token for token in said if token is not None])
        return True

    async def keep_asking(self, client: Generator, name: str, turns: int) -> None:
        """Until all clients together have had so many turns."""
        while self.crowd.turns.total() < turns:
            if await self.ask(client) and self.crowd.turns.total() < turns:
                self.crowd.turns[name] += 1

    def sessions(self) -> int:
        """Answers that have room on all their stages."""
        return sum(len(client._readers) for client, _ in self.swarm.clients)

    async def freed(self) -> None:
        alive = [node.worker for name, node in self.swarm.nodes.items() if name not in self.killed]
        await until(lambda: not any(len(worker.sessions) for worker in alive), 2.0)
        for worker in alive:
            worker.sessions.check()
            assert not worker._replays
            assert not worker._clients._opened_on
            assert all(not executor._caches for executor in worker._executors.values())  # type: ignore[attr-defined]
        for view in self.swarm.views:
            assert not view._loads._own


@pytest.fixture
async def scene(shelf: StageShelf, tiny_model: Callable[[str], Path]) -> AsyncIterator[Scene]:
    swarm = MemorySwarm(JitteryNetwork())
    yield Scene(swarm, shelf, tiny_model("llama"))
    await swarm.close()


async def test_all_the_room_is_used_and_the_rest_are_refused_in_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setattr("bsns.client.opening.ROOM_S", 2.0)
    await scene.start()
    undisturbed = await scene.undisturbed()
    clients, hold = scene.clients(), asyncio.Event()
    started_s = running_s()
    tasks = [asyncio.create_task(scene.ask(clients[n % CLIENTS], hold)) for n in range(200)]
    await until(lambda: scene.sessions() == ROOM, 2.0 + LATE_S)
    record_property("filled_s", round(running_s() - started_s, 2))
    await until(lambda: len(scene.crowd.refusals) == 200 - ROOM, 2.0 + LATE_S)
    hold.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert scene.crowd.said == [undisturbed] * ROOM
    record_property("refused_s", round(max(took_s for _, took_s in scene.crowd.refusals), 2))
    for error, took_s in scene.crowd.refusals:
        assert isinstance(error, CacheFull)
        assert "ask again later" in error.message
        assert took_s < 2.0 + LATE_S
    await scene.freed()


async def test_those_that_wait_get_the_room_of_those_that_end(scene: Scene) -> None:
    await scene.start()
    undisturbed = await scene.undisturbed()
    clients = scene.clients()
    await asyncio.wait_for(asyncio.gather(*(scene.ask(clients[n % CLIENTS]) for n in range(60))), 20)
    assert not scene.crowd.refusals
    assert scene.crowd.said == [undisturbed] * 60
    await scene.freed()


async def test_clients_that_keep_asking_take_turns(
    scene: Scene, record_property: Callable[[str, object], None]
) -> None:
    """Some want much at once, and some one after the other: few clients with many turns, so that chance evens out."""
    await scene.start(room=2)
    await scene.undisturbed()
    users = [
        (client, f"{number}") for number, client in enumerate(scene.clients(4)) for _ in range(1 if number % 2 else 9)
    ]
    await asyncio.wait_for(asyncio.gather(*(scene.keep_asking(*user, 40) for user in users)), 60)
    turns = [scene.crowd.turns[f"{number}"] for number in range(4)]
    record_property("turns", turns)
    assert min(turns) >= 4, turns
    assert max(turns) <= 3 * min(turns), turns
    assert all(isinstance(error, CacheFull) for error, _ in scene.crowd.refusals)
    await scene.freed()


async def test_who_comes_late_is_not_shut_out_by_those_that_ask_again_at_once(
    scene: Scene, record_property: Callable[[str, object], None]
) -> None:
    await scene.start(room=3)
    await scene.undisturbed()
    holders, (late,) = scene.clients(3), scene.clients(1)
    tasks = [asyncio.create_task(scene.keep_asking(client, f"{number}", 24)) for number, client in enumerate(holders)]
    await until(lambda: scene.crowd.turns.total() >= 3)
    overtaken: list[int] = []
    for _ in range(3):
        before = scene.crowd.turns.copy()
        assert await scene.ask(late)
        overtaken.append(max((scene.crowd.turns - before).values(), default=0))
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    record_property("overtaken", overtaken)
    assert not scene.crowd.refusals
    assert max(overtaken) <= 3, "what ran already, one that came just before it, and what ended during its own answer"
    await scene.freed()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_stage_that_dies_meanwhile(
    scene: Scene, number: int, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Answers go on where there is room on another node, and nobody hangs."""
    monkeypatch.setattr("bsns.client.opening.ROOM_S", 2.0)
    await scene.start(f"b{number}")
    undisturbed = await scene.undisturbed()
    clients, hold = scene.clients(), asyncio.Event()
    tasks = [asyncio.create_task(scene.ask(clients[n % CLIENTS], hold)) for n in range(200)]
    await until(lambda: scene.sessions() > ROOM // 2)
    scene.killed.add(f"a{number}")
    scene.swarm.network.kill(PeerId(f"a{number}"))
    hold.set()
    started_s = running_s()
    await asyncio.wait_for(asyncio.gather(*tasks), 25)
    record_property("took_s", round(running_s() - started_s, 2))
    record_property("answered", len(scene.crowd.said))
    assert len(scene.crowd.said) >= ROOM
    assert scene.crowd.said == [undisturbed] * len(scene.crowd.said)
    assert all(isinstance(error, CacheFull) for error, _ in scene.crowd.refusals), scene.crowd.refusals
    await scene.freed()


async def test_a_stage_that_dies_and_that_nobody_can_replace(scene: Scene) -> None:
    """Everybody hears so, in time."""
    await scene.start()
    await scene.undisturbed()
    clients, hold = scene.clients(deadline_s=2.0), asyncio.Event()
    tasks = [asyncio.create_task(scene.ask(clients[n % CLIENTS], hold)) for n in range(200)]
    await until(lambda: scene.sessions() > ROOM // 2)
    scene.killed.add("a1")
    scene.swarm.network.kill(PeerId("a1"))
    hold.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 15)
    assert len(scene.crowd.said) + len(scene.crowd.refusals) == 200
    assert all(isinstance(error, (SwarmError, PeerError)) for error, _ in scene.crowd.refusals)
    assert max(took_s for _, took_s in scene.crowd.refusals) < UNREACHED_S + 2.0 + LATE_S
    await scene.freed()


async def test_who_is_refused_on_an_earlier_stage_keeps_no_room_on_a_later_one(scene: Scene) -> None:
    for name, room in (("a0", 2), ("a1", 1), ("a2", 2)):
        await scene.add(name, room)
    (holder, other), hold = scene.clients(2), asyncio.Event()
    tasks = [asyncio.create_task(scene.ask(holder, hold))]
    await until(lambda: scene.sessions() == 1)
    tasks.append(asyncio.create_task(scene.ask(other)))
    first, second, _ = (node.worker.sessions for node in scene.swarm.nodes.values())
    await until(lambda: second.waiting_clients == 1 and len(first) == 1)
    filler = Open(SessionId(7), MODEL, 0, 2, "float32", TOKENS, 1, None)
    first.open(filler, PeerId("filler"), scene.swarm.nodes["a0"].worker._now_s())
    await until(lambda: (first.waiting_clients, second.waiting_clients) == (1, 0))
    assert first.close(filler.session, PeerId("filler"))
    await until(lambda: (first.waiting_clients, second.waiting_clients) == (0, 1))
    hold.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
    assert len(scene.crowd.said) == 2
    await scene.freed()
    assert not any(node.worker.sessions.waiting_clients for node in scene.swarm.nodes.values())


async def test_what_can_never_have_room_is_refused_at_once(scene: Scene) -> None:
    await scene.start(room=1)
    started_s = running_s()
    with pytest.raises(CacheTooSmall, match="ask for fewer"):
        await answer(scene.clients(1)[0], PROMPT, SamplingOptions(max_tokens=TOKENS))
    assert running_s() - started_s < LATE_S
    await scene.freed()


async def test_one_that_waits_can_be_cancelled(scene: Scene) -> None:
    """And those behind it move up."""
    await scene.start(room=1)
    (client,), hold = scene.clients(1), asyncio.Event()
    first = asyncio.create_task(scene.ask(client, hold))
    await until(lambda: scene.sessions() == 1)
    tasks = [asyncio.create_task(scene.ask(client)) for _ in range(3)]
    await until(client._opener._waiting.locked)
    await asyncio.sleep(0.1)
    tasks[0].cancel()
    hold.set()
    await asyncio.wait_for(asyncio.gather(first, *tasks[1:]), 10)
    assert len(scene.crowd.said) == 3
    await scene.freed()
