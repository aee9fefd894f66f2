"""A crew: many pieces of work at once, so many at a time, all ended when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Do `work` for each item, begun in their order. The first failure is raised, and nothing runs any more then."""
    left = iter(items)

    async def member() -> None:
        for item in left:
            await work(item)

    members = [asyncio.create_task(member()) for _ in range(at_once)]
    try:
        await asyncio.gather(*members)
    finally:
        for task in members:
            task.cancel()
        await asyncio.gather(*members, return_exceptions=True)
