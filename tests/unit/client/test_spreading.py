"""A client's sessions over replicas: where they go while others are open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from memory_swarm import MemorySwarm, StageShelf, until
from tiny_models import prompt

from bsns.client.generate import Generator
from bsns.client.pieces import Piece
from bsns.client.sampling import SamplingOptions
from bsns.worker.torch_executor import TorchExecutor

BLOCKS = 5


async def replicas(swarm: MemorySwarm, shelf: StageShelf, path: Path, block_times_s: list[float]) -> Generator:
    [stage] = shelf.stages(path, (0, BLOCKS))
    for number, time_s in enumerate(block_times_s):
        executor = TorchExecutor(stage, dtype="float32")
        await swarm.add_node(f"node-{number}", executor, block_count=BLOCKS, block_time_s=time_s)
    return swarm.client(shelf.ends(path))


def open_sessions(swarm: MemorySwarm) -> list[int]:
    return [len(node.worker.sessions) for node in swarm.nodes.values()]


async def test_eight_sessions_over_two_equal_replicas(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    client = await replicas(swarm, shelf, tiny_model("llama"), [0.1, 0.1])
    async with contextlib.AsyncExitStack() as answers:

        async def begin() -> AsyncGenerator[Piece, None]:
            pieces = client.stream(prompt(4), SamplingOptions(max_tokens=100))
            await answers.enter_async_context(contextlib.aclosing(pieces))
            await anext(pieces)
            return pieces

        first = [await begin() for _ in range(2)]  # one after another, and then all at once
        assert open_sessions(swarm) == [1, 1]
        await asyncio.gather(*(begin() for _ in range(6)))
        assert open_sessions(swarm) == [4, 4]
        await first[0].aclose()
        await until(lambda: sorted(open_sessions(swarm)) == [3, 4])
        await begin()  # goes where there is room again
        assert open_sessions(swarm) == [4, 4]
    await until(lambda: open_sessions(swarm) == [0, 0])
    assert set(swarm.views[0].sessions().values()) == {0}


async def test_a_node_three_times_as_fast_is_given_more(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    client = await replicas(swarm, shelf, tiny_model("llama"), [0.1, 0.3])
    async with contextlib.AsyncExitStack() as answers:
        for _ in range(11):
            pieces = client.stream(prompt(4), SamplingOptions(max_tokens=20))
            await answers.enter_async_context(contextlib.aclosing(pieces))
            await anext(pieces)
        # 0.1 · (1 + s/4) reaches 0.3 with eight sessions, and 0.3 · (1 + 1/4) with eleven
        assert open_sessions(swarm) == [10, 1]


async def test_a_session_that_is_refused_does_not_count(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    client = await replicas(swarm, shelf, tiny_model("llama"), [0.1, 0.1])
    swarm.nodes["node-0"].worker.sessions.max_sessions = 0
    pieces = client.stream(prompt(4), SamplingOptions(max_tokens=20))
    async with contextlib.aclosing(pieces):
        await anext(pieces)
        assert open_sessions(swarm) == [0, 1]
        assert dict(swarm.views[0].sessions()) == {"node-0": 0, "node-1": 1}
