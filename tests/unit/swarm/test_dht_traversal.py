"""Walks through the DHT leave no task behind that nobody will ever wake."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.traverse import traverse_dht as left_alone

from bsns.swarm import dht_traversal

Found = dict[DHTID, tuple[tuple[DHTID, ...], bool]]
NODES = [DHTID.generate(source=f"node-{number}".encode()) for number in range(40)]
QUERY = DHTID.generate(source=b"query")


async def walk(
    traverse: Callable[..., Awaitable[Any]], *, answers: int, give_up_s: float, stops: bool = False
) -> list[str]:
    """Walk among nodes of which only so many answer; what the loop complains of afterwards."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    asked = 0

    async def get_neighbors(peer: DHTID, queries: Collection[DHTID]) -> Found:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.001)
        if asked > answers:
            await asyncio.sleep(0.3)
        return {query: (tuple(NODES), stops) for query in queries}

    try:
        async with asyncio.timeout(give_up_s):
            await traverse(
                [QUERY],
                initial_nodes=NODES[:3],
                beam_size=20,
                num_workers=4,
                queries_per_call=1,
                get_neighbors=get_neighbors,
                await_all_tasks=False,
            )
    except TimeoutError:
        pass
    await asyncio.sleep(0.01)
    gc.collect()
    await asyncio.sleep(0)
    return complaints


@pytest.fixture
def tidy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivemind.dht.traverse.asyncio", dht_traversal._Asyncio())


async def test_hivemind_itself_leaves_tasks_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it does not, ours is no longer needed."""
    monkeypatch.setattr("hivemind.dht.traverse.asyncio", asyncio)
    assert "Task was destroyed but it is pending!" in await walk(left_alone, answers=8, give_up_s=0.1)


async def test_a_walk_that_is_given_up_leaves_nothing(tidy: None) -> None:
    assert await walk(dht_traversal.traverse_dht, answers=8, give_up_s=0.1) == []


@pytest.mark.parametrize("stops", [False, True])
async def test_nor_does_one_that_comes_to_its_end(tidy: None, stops: bool) -> None:
    assert await walk(dht_traversal.traverse_dht, answers=1000, give_up_s=5.0, stops=stops) == []


def test_every_dht_node_walks_so() -> None:
    from hivemind.dht import node, traverse

    import bsns.swarm.hivemind_directory  # noqa: F401

    assert node.traverse_dht is dht_traversal.traverse_dht
    assert isinstance(traverse.asyncio, dht_traversal._Asyncio)
