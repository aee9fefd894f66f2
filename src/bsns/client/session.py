"""One session on a route: opened on every stage at once, stepped through the first, heard from the last."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence

import structlog

from bsns.client.links import Link, Links
from bsns.core.errors import BsnsError
from bsns.core.ids import ModelId, SessionId
from bsns.protocol.inference import Close, Open
from bsns.routing.chain import Route

log = structlog.get_logger(__name__)


class Session:
    """A reservation of `max_tokens` of KV cache on every stage of a route."""

    def __init__(self, links: Links, route: Route, *, model: ModelId, dtype: str, max_tokens: int) -> None:
        self.id = SessionId(secrets.randbits(63))
        self.route = route
        self.max_tokens = max_tokens
        self._links = links
        self._model = model
        self._dtype = dtype
        self._asked: list[Link] = []
        self._open: list[Link] = []

    @property
    def first(self) -> Link:
        """Where steps enter the route."""
        return self._open[0]

    async def open(self, deadline_s: float = 10.0) -> None:
        """Open the session on every stage. Raises the first stage's error; nothing stays open then."""
        try:
            results = await asyncio.gather(
                *(self._open_stage(index, deadline_s) for index in range(len(self.route))), return_exceptions=True
            )
        except asyncio.CancelledError:
            self._take_back()
            raise
        links = [result for result in results if isinstance(result, Link)]
        errors = [result for result in results if isinstance(result, BaseException)]
        # a node that opened and died while others still did: nobody listens for that yet
        errors += [link.lost.about(link.peer) for link in links if link.lost is not None]
        if errors:
            self._take_back()
            raise errors[0]
        self._open = links

    def _take_back(self) -> None:
        """Close on every stage that was asked: one that has not answered may have opened the session all the same."""
        for link in self._asked:
            with contextlib.suppress(BsnsError):
                link.post(Close(self.id))

    async def _open_stage(self, index: int, deadline_s: float) -> Link:
        hop = self.route[index]
        try:
            return await self._ask_stage(index, deadline_s)
        except BsnsError as error:
            named = error if hop.peer in error.message else type(error)(f"node {hop.peer}: {error.message}")
            raise named.about(error.peer or hop.peer) from None

    async def _ask_stage(self, index: int, deadline_s: float) -> Link:
        hop = self.route[index]
        onward = self.route[index + 1] if index + 1 < len(self.route) else None
        link = await self._links.to(hop.peer, hop.addresses)
        self._asked.append(link)
        request = Open(
            session=self.id,
            model=self._model,
            start=hop.blocks.start,
            end=hop.blocks.end,
            dtype=self._dtype,
            max_tokens=self.max_tokens,
            depth=len(self.route),
            next_peer=onward.peer if onward else None,
            next_addresses=onward.addresses if onward else (),
            previous_peer=self.route[index - 1].peer if index else None,
        )
        await link.open(request, deadline_s)
        return link

    async def close(self, deadline_s: float = 2.0) -> None:
        """Free the session on every stage that still answers; the others free it when they see our stream gone."""
        links, self._open = self._open, []
        outcomes: Sequence[int | BaseException] = await asyncio.gather(
            *(link.close_session(self.id, deadline_s) for link in links), return_exceptions=True
        )
        for link, outcome in zip(links, outcomes, strict=True):
            if isinstance(outcome, BsnsError):
                log.info("a node did not confirm the end of a session", node=link.peer, error=outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome
