"""One session on a route: opened on every stage at once, stepped through the first, heard from the last."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence

import structlog

from bsns.client.links import Link, Links
from bsns.core.errors import BsnsError, PeerTimedOut
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.inference import Close, Open, Reroute
from bsns.routing.chain import Hop, Route

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
        self._taking: Route = ()
        """A route that is being turned to: its last stage may answer before the others say that they are ready."""
        self._open: list[Link] = []

    @property
    def first(self) -> Link:
        """Where steps enter the route."""
        return self._open[0]

    def may_answer(self, peer: PeerId) -> bool:
        """Whether results may come from this peer."""
        return any(route[-1].peer == peer for route in (self.route, self._taking) if route)

    @property
    def links(self) -> tuple[Link, ...]:
        """One to each stage, in their order."""
        return tuple(self._open)

    async def open(self, deadline_s: float = 10.0) -> None:
        """Open the session on every stage. Raises the first stage's error; nothing stays open then."""
        try:
            self._open = await self._open_all(self.route, range(len(self.route)), deadline_s, lambda _: 0)
        except BaseException:
            self._take_back(self._asked)
            raise

    async def _open_all(
        self, route: Route, stages: range, deadline_s: float, passes_from: Callable[[int], int]
    ) -> list[Link]:
        results = await asyncio.gather(
            *(self._open_stage(route, index, deadline_s, passes_from(index)) for index in stages),
            return_exceptions=True,
        )
        links = [result for result in results if isinstance(result, Link)]
        errors = [result for result in results if isinstance(result, BaseException)]
        # a node that opened and died while others still did: nobody listens for that yet
        errors += [link.lost.about(link.peer) for link in links if link.lost is not None]
        if errors:
            raise errors[0]
        return links

    async def replace(self, start: int, end: int, hops: Route, *, passes_from: int, deadline_s: float) -> None:
        """Put `hops`, which compute the same blocks, in the place of the stages [start, end) of the route.

        They get everything that the stage before them has sent, and pass on what comes at `passes_from` or after. Of
        the first stages' place nothing is sent here: the caller replays. Raises what the new stages or their neighbours
        answer, blaming them; the route is as it was then.
        """
        route = (*self.route[:start], *hops, *self.route[end:])
        old = self._open[start:end]
        taking = {hop.peer for hop in hops}
        self._take_back([link for link in old if link.peer in taking])  # it begins again
        self._asked = []
        last = start + len(hops) - 1
        self._taking = route
        try:
            opened = await self._open_all(
                route, range(start, last + 1), deadline_s, lambda index: passes_from if index == last else 0
            )
            links = [*self._open[:start], *opened, *self._open[end:]]
            # whoever comes after has to know first whom to listen to
            for index in (last + 1, start - 1):
                if 0 <= index < len(route):
                    await self._reroute(links[index], route, index, index < start, deadline_s)
        except BaseException:
            self._take_back(self._asked)
            raise
        finally:
            self._taking = ()
        self.route, self._open = route, links
        self._take_back([link for link in old if link.peer not in taking])

    async def _reroute(self, link: Link, route: Route, index: int, again: bool, deadline_s: float) -> None:
        before, after = _neighbours(route, index)
        message = Reroute(
            self.id,
            before.peer if before else None,
            after.peer if after else None,
            after.addresses if after else (),
            again,
        )
        try:
            await link.reroute(message, deadline_s)
        except BsnsError as error:
            raise error.about(link.peer) from None

    def _take_back(self, links: Sequence[Link]) -> None:
        """Close on stages that were asked: one that has not answered may have opened the session all the same."""
        for link in links:
            with contextlib.suppress(BsnsError):
                link.post(Close(self.id))

    async def _open_stage(self, route: Route, index: int, deadline_s: float, passes_from: int) -> Link:
        hop = route[index]
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask_stage(route, index, deadline_s, passes_from)
        except TimeoutError:
            raise PeerTimedOut(f"node {hop.peer} was not reached within {deadline_s:g} s").about(hop.peer) from None
        except BsnsError as error:
            named = error if hop.peer in error.message else type(error)(f"node {hop.peer}: {error.message}")
            # a stage knows of its neighbours only; whom else it names, it made up
            known = {neighbour.peer for neighbour in _neighbours(route, index) if neighbour is not None}
            named.peer = error.peer if error.peer in known else hop.peer
            raise named from None

    async def _ask_stage(self, route: Route, index: int, deadline_s: float, passes_from: int) -> Link:
        hop = route[index]
        before, after = _neighbours(route, index)
        link = await self._links.to(hop.peer, hop.addresses)
        self._asked.append(link)
        request = Open(
            session=self.id,
            model=self._model,
            start=hop.blocks.start,
            end=hop.blocks.end,
            dtype=self._dtype,
            max_tokens=self.max_tokens,
            depth=len(route),
            next_peer=after.peer if after else None,
            next_addresses=after.addresses if after else (),
            previous_peer=before.peer if before else None,
            passes_from=passes_from,
        )
        await link.open(request, deadline_s)
        return link

    async def close(self, deadline_s: float = 2.0) -> None:
        """Free the session on every stage that still answers; the others free it when they see our stream gone."""
        links, self._open = self._open, []
        outcomes: Sequence[int | BaseException] = await asyncio.gather(
            *(link.close_session(self.id, deadline_s) for link in links if link.lost is None), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BsnsError):
                log.info("a node did not confirm the end of a session", error=outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome


def _neighbours(route: Route, index: int) -> tuple[Hop | None, Hop | None]:
    """Who comes before a stage, and who after it; the client is nobody."""
    return route[index - 1] if index else None, route[index + 1] if index + 1 < len(route) else None
