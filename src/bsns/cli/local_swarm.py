"""A swarm of node processes on this machine, as `bsns up` and `bsns eval` start it and take it down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from bsns.cli.console import Say, doing, say_aside, see_through
from bsns.core.errors import BadOption
from bsns.core.words import several

if TYPE_CHECKING:
    from bsns.model.source import ModelSource
    from bsns.node.local import LocalSwarm


T = TypeVar("T")


async def start(source: ModelSource, model: str, nodes: int, say: Say, **options: Any) -> LocalSwarm:
    """The model in equal ranges on so many nodes; `options` are those of LocalSwarm. Raises BadOption for too many, and
    what LocalSwarm does."""
    from bsns.node.local import LocalSwarm
    from bsns.planning.joining import equal_split

    if nodes > source.block_count:
        raise BadOption(
            f"{source.name} has {several(source.block_count, 'block')}, too few for {several(nodes, 'node')}; "
            f"give --nodes 1 to {source.block_count}"
        )
    say(f"starting {several(nodes, 'node')}")

    def told(number: int, what: str) -> None:
        say(f"node {number + 1} · {what}", line=number + 1)

    return await LocalSwarm(model, equal_split(source.block_count, nodes), told=told, **options).__aenter__()


async def mended(work: Coroutine[Any, Any, T], swarm: LocalSwarm, told: Callable[[str], None] = say_aside) -> T:
    """See it through, while nodes whose processes end are started again. Raises why one was not."""
    working, mending = asyncio.create_task(work), asyncio.create_task(swarm.mend(told))
    try:
        await asyncio.wait((working, mending), return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        mending.cancel()
        await asyncio.gather(working, mending, return_exceptions=True)
    if working.cancelled():
        raise mending.result()
    return working.result()


async def take_down(swarm: LocalSwarm, *, quiet: bool) -> None:
    with doing("taking the swarm down", quiet=quiet):
        await see_through(swarm.close())
