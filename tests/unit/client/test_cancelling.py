"""An answer that is given up, however that comes about, leaves nothing on any node for longer than two seconds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from memory_swarm import MemorySwarm, StageShelf, until
from running_time import running_s
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BsnsError, PeerLost
from bsns.core.ids import PeerId
from bsns.transport.memory import MemoryTransport
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 3, 5)
OPTIONS = SamplingOptions(max_tokens=200)
FREED_S = 2.0


class Scene:
    """Three stages, `a0` to `a2`, spares for them, `b0` to `b2`, and one answer with warm spares under way."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm = swarm
        self.stages = shelf.stages(path, CUTS)
        self.ends = shelf.ends(path)
        self.out: set[str] = set()
        self.client: Generator
        self.transport: MemoryTransport
        self.task: asyncio.Task[None]
        self.said = 0
        self.deaf = False
        """Whether whoever reads the answer does not go on with it."""

    async def start(self) -> None:
        for kind in "ab":
            for number, stage in enumerate(self.stages):
                await self.swarm.add_node(
                    f"{kind}{number}",
                    TorchExecutor(stage, dtype="float32"),
                    block_count=CUTS[-1],
                    context_tokens=512,
                    block_time_s=1e-3 if kind == "a" else 1.0,
                )
        self.client = self.swarm.client(self.ends, context_tokens=512, warm_spares=True)
        self.transport = self.swarm.clients[-1][1]
        self.stream = self.client.stream(prompt(9), OPTIONS)
        self.task = asyncio.create_task(self.read())
        await until(lambda: self.said >= 5 and len(self.holding()) == 6)
        (held,) = self.client._spares._held.values()
        await until(lambda: all(spare.link is not None for spare in held.spares.values()))

    async def read(self) -> None:
        async for _ in self.stream:
            self.said += 1
            await asyncio.sleep(0.001)
            await until(lambda: not self.deaf, math.inf)

    def holding(self) -> list[str]:
        """Nodes that are here and have something of a session."""
        return [
            name
            for name, node in self.swarm.nodes.items()
            if name not in self.out and (len(node.worker.sessions) or len(node.worker._replays))
        ]

    def freeze(self, *names: str) -> None:
        for name in names:
            self.swarm.network.freeze(PeerId(name))
            self.out.add(name)

    def thaw(self) -> None:
        for name in list(self.out):
            self.swarm.network.sound(PeerId(name))
            if PeerId(name) in self.swarm.network._peers:
                self.out.discard(name)

    def kill(self, name: str) -> None:
        self.swarm.network.kill(PeerId(name))
        self.out.add(name)

    async def freed(self) -> None:
        started_s = running_s()
        await until(lambda: not self.holding(), FREED_S)
        assert running_s() - started_s < FREED_S
        for name, node in self.swarm.nodes.items():
            if name not in self.out:
                node.worker.sessions.check()
                assert node.worker.sessions.reserved == 0
                assert not node.worker._clients._opened_on
                executors = node.worker._executors.values()
                assert all(not executor._caches for executor in executors)  # type: ignore[attr-defined]

    async def forgotten(self) -> None:
        """The client has nothing of it either."""
        await until(lambda: not self.client._tasks, 5.0)
        assert not self.client._readers
        assert not self.client._spares._held
        assert not self.swarm.views[-1]._loads._own


@pytest.fixture
def scene(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Scene:
    return Scene(swarm, shelf, tiny_model("llama"))


async def cancelled(scene: Scene) -> None:
    scene.task.cancel()
    await asyncio.gather(scene.task, return_exceptions=True)
    await scene.stream.aclose()


async def cancelled_twice(scene: Scene) -> None:
    """As whoever has little patience does: the second time while the first is still being seen to."""
    scene.task.cancel()
    await asyncio.sleep(0)
    scene.task.cancel()
    await asyncio.gather(scene.task, return_exceptions=True)
    await scene.stream.aclose()


async def closed(scene: Scene) -> None:
    """The client is closed, and whoever reads the answer hears so."""
    closing = asyncio.create_task(scene.client.close())
    with pytest.raises(PeerLost, match="closed"):
        await scene.task
    await scene.freed()
    await closing


async def closed_and_forgotten(scene: Scene) -> None:
    """The client is closed, and nobody reads the answer any more."""
    scene.deaf = True
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(scene.client.close())
    await scene.freed()
    await closing
    scene.deaf = False
    await asyncio.gather(scene.task, return_exceptions=True)


async def cut_off(scene: Scene) -> None:
    """The client's streams end, and it reaches nobody any more."""
    for name in scene.swarm.nodes:
        scene.swarm.network.cut(scene.transport.peer, PeerId(name))
    await scene.freed()
    await cancelled(scene)


async def killed(scene: Scene) -> None:
    """The client's process is gone."""
    scene.swarm.network.kill(scene.transport.peer)
    await scene.freed()
    await cancelled(scene)


WAYS = [cancelled, cancelled_twice, closed, closed_and_forgotten, cut_off, killed]
Way = Callable[[Scene], Awaitable[None]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", ["a0", "a1", "a2", "b0", "b1", "b2"])
async def test_with_a_frozen_stage_or_spare(scene: Scene, frozen: str, way: Way) -> None:
    await scene.start()
    scene.freeze(frozen)
    await asyncio.sleep(0.05)
    await way(scene)
    await scene.freed()
    scene.thaw()
    await scene.freed()
    await scene.forgotten()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("lost", ["a0", "a1", "a2"])
async def test_while_a_stage_is_replaced(scene: Scene, lost: str, after_s: float, way: Way) -> None:
    """By a warm spare that is frozen, at first; then by nobody."""
    await scene.start()
    scene.freeze(lost.replace("a", "b"))
    scene.kill(lost)
    await until(lambda: any(reader.mending is not None for reader in scene.client._readers.values()))
    await asyncio.sleep(after_s)
    await way(scene)
    await scene.freed()
    scene.thaw()
    await scene.freed()
    await scene.forgotten()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", ["a0", "a1", "a2"])
async def test_while_a_frozen_stage_is_looked_for_and_given_up(
    scene: Scene, frozen: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.start()
    monkeypatch.setattr("bsns.client.watch.PATIENCE_S", 0.05)
    monkeypatch.setattr("bsns.client.watch.PING_S", 0.1)
    (reader,) = scene.client._readers.values()
    scene.freeze(frozen)
    await until(lambda: bool(reader.lost) or scene.client.repairs > 0)
    await way(scene)
    await scene.freed()
    scene.thaw()
    await scene.freed()
    await scene.forgotten()


async def test_a_stage_that_was_replaced_has_nothing_left_once_it_is_back(scene: Scene) -> None:
    await scene.start()
    scene.freeze("a1")
    said = scene.said
    await until(lambda: scene.said > said + 5)
    scene.thaw()
    await until(lambda: "a1" not in scene.holding(), FREED_S)
    await cancelled(scene)
    await scene.freed()
    await scene.forgotten()


async def test_an_open_that_is_given_up_while_a_stage_is_frozen(scene: Scene) -> None:
    await scene.start()
    await cancelled(scene)
    await scene.freed()
    scene.freeze("a1")
    task = asyncio.create_task(anext(scene.client.stream(prompt(9), OPTIONS)))
    await until(lambda: "a0" in scene.holding())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await scene.freed()
    scene.thaw()
    await scene.freed()
    await scene.forgotten()


async def test_a_closed_client_dials_nobody(scene: Scene) -> None:
    await scene.start()
    await cancelled(scene)
    await scene.client.close()
    with pytest.raises(BsnsError, match="closed"):
        await anext(scene.client.stream(prompt(9), OPTIONS))
    await scene.freed()


async def test_a_spare_that_was_given_up_is_fed_no_more(scene: Scene) -> None:
    """Its task would wait for ever, and be destroyed while it does."""
    await scene.start()
    spares = scene.client._spares
    (reader,), (held,) = scene.client._readers.values(), spares._held.values()
    spare = held.spares[PeerId("b0")]
    assert spare.feeding is not None
    spares._drop(reader, held, spare)
    await spares._have_mirrored(reader, held, spare, 0)
    assert spare.feeding is None
    await cancelled(scene)
    await scene.freed()
