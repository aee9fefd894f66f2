"""A worker that moves: sessions on its old range go on, new ones take the new range, and the old one is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from memory_swarm import MemorySwarm, StageShelf, answer, until
from tiny_models import prompt

from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.routing.chain import Hop
from bsns.worker.torch_executor import TorchExecutor

OPTIONS = SamplingOptions(max_tokens=24)
OLD, NEW = BlockRange(0, 3), BlockRange(1, 4)


async def test_a_move_changes_no_token(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    await swarm.add_stages([shelf.stage(path, blocks) for blocks in (OLD, BlockRange(3, 5))], block_count=5)
    ends = shelf.ends(path)
    expected = await answer(swarm.client(ends), prompt(9), OPTIONS)
    mover, last = swarm.nodes["node-0"], swarm.nodes["node-1"]
    worker = mover.worker

    tokens: list[int] = []
    async for piece in swarm.client(ends).stream(prompt(9), OPTIONS):
        if piece.token is not None:
            tokens.append(piece.token)
        if len(tokens) == 4:  # in the middle of its answer the node takes on another range
            worker.take_on(TorchExecutor(shelf.stage(path, NEW), dtype="float32"))
            worker.sessions.drain(OLD)
            assert worker.sessions.ranges == (NEW, OLD)
        if len(tokens) == 8:  # a new session comes, on a route that only the new range allows
            await swarm.add_stages([shelf.stage(path, BlockRange(0, 1))], block_count=5)
            route = (
                swarm.nodes["node-2"].hop,
                Hop(mover.transport.peer, NEW, mover.transport.addresses),
                Hop(last.transport.peer, BlockRange(4, 5), last.transport.addresses),
            )
            assert await answer(swarm.client(ends, route=route), prompt(9), OPTIONS) == expected
            assert worker.sessions.running_on(OLD) == 1
            assert not worker.drop(OLD)
    assert tokens == expected
    await until(lambda: worker.sessions.running_on(OLD) == 0)
    assert worker.drop(OLD)
    assert worker.sessions.ranges == (NEW,)
    assert (worker.description().start, worker.description().end) == (1, 4)
    worker.sessions.check()
