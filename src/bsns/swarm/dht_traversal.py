"""hivemind's walk through the DHT, made to leave nothing waiting behind it.

`traverse_dht` (hivemind 1.1) makes workers that wait for one another, and for each question a task that waits for the
walk's end. Where a walk is given up, or ends while a worker waits, nobody ever wakes those; when they are collected
asyncio complains: "Task was destroyed but it is pending!".
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

from hivemind.dht import node, traverse

_WAITING = ("Event.wait", "traverse_dht.<locals>.worker")
"""What only waits; the questions themselves end by their deadline, and callbacks store what was found."""

_made: ContextVar[list[asyncio.Task[Any]]] = ContextVar("made")
_walk = traverse.traverse_dht


class _Asyncio:
    """asyncio as `traverse_dht` sees it: what it makes is remembered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        if getattr(coroutine, "__qualname__", "") in _WAITING:
            _made.get().append(task)
        return task


async def traverse_dht(*arguments: Any, **options: Any) -> Any:
    """hivemind's function of this name; ends, however it ends, with all that it left waiting."""
    made: list[asyncio.Task[Any]] = []
    _made.set(made)
    try:
        return await _walk(*arguments, **options)
    finally:
        for task in made:
            task.cancel()


def tidy() -> None:
    """Let every DHT node of this process walk so."""
    traverse.asyncio = _Asyncio()
    node.traverse_dht = traverse_dht
