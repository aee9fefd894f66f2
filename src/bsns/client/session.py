"""One session on a route: opened on every stage at once, stepped through the first, heard from the last."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence

import msgspec
import structlog

from bsns.client.finding import ChooseCodec
from bsns.client.links import Link, Links
from bsns.core.errors import BsnsError, CacheFull, PeerTimedOut
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.codecs import RAW
from bsns.protocol.inference import Close, Open, Reroute, Resize
from bsns.routing.chain import Hop, Route, at_once

log = structlog.get_logger(__name__)

LEAST_ID = 10**18
"""All ids have as many digits, so that what is said of sessions has the same length in every simulation."""


class Session:
    """A reservation of `max_tokens` of KV cache on every stage of a route."""

    def __init__(
        self,
        links: Links,
        route: Route,
        *,
        model: ModelId,
        dtype: str,
        max_tokens: int,
        choose_codec: ChooseCodec = lambda sender, receiver: RAW,
        trace: str = "",
    ) -> None:
        self.id = SessionId(LEAST_ID + secrets.randbelow(2**63 - LEAST_ID))
        self.route = route
        self.max_tokens = max_tokens
        self.trace = trace
        """The span that stages are told of (protocol.inference.Open)."""
        self._links = links
        self._model = model
        self._dtype = dtype
        self._choose_codec = choose_codec
        self._codecs: dict[int, str] = {}
        """By the block they come before: chosen when a route first parts there, and kept, so that whoever takes a lost
        stage's place computes from the same numbers."""
        self._taking: Route = ()
        """A route that is being turned to: its last stage may answer before the others say that they are ready."""
        self._open: list[Link] = []
        self._in_line: list[Link] = []
        """To stages at which this session may have a place in line."""

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

    @property
    def takes(self) -> str:
        """The codec of what enters the route."""
        return self._codec(self.route, 0)

    @property
    def brings(self) -> str:
        """The codec of what comes back."""
        return self._codec(self.route, len(self.route))

    def _codec(self, route: Route, index: int) -> str:
        """Of what comes to a stage of a route, or after its last from there."""
        before, after = (route[index - 1] if index else None), (route[index] if index < len(route) else None)
        block = after.blocks.start if after is not None else route[-1].blocks.end
        if block not in self._codecs:
            sender, receiver = (hop.peer if hop is not None else None for hop in (before, after))
            self._codecs[block] = self._choose_codec(sender, receiver)
        return self._codecs[block]

    async def open(self, deadline_s: float = 10.0, *, in_line: bool = False) -> None:
        """Open the session on every stage. Raises the first stage's error; nothing stays open then.

        `in_line`: on one stage after the other, and standing in line at a full one. So sessions that want the same
        stages do not all keep room on some of them and find none on the rest.
        """
        count = len(self.route)
        parts = [range(index, index + 1) for index in range(count)] if in_line else [range(count)]
        opened: list[Link] = []
        try:
            for stages in parts:
                opened += await self._open_all(self.route, stages, deadline_s, lambda _: 0, waits=in_line)
        except BaseException:
            self.take_back(opened)
            self._in_line += opened  # there it comes where it was, if it had waited
            raise
        self._open = opened

    def leave_line(self) -> None:
        """Keep no room from others where it stands in line, unless another session has asked for it since."""
        self.take_back(self._in_line)

    async def open_spare(self, start: int, end: int, hop: Hop, deadline_s: float) -> Link:
        """Open the session on a spare for the stages [start, end), which computes along and passes nothing on. Raises
        as `open` does."""
        route = (*self.route[:start], hop, *self.route[end:])
        (link,) = await self._open_all(route, range(start, start + 1), deadline_s, lambda _: self.max_tokens)
        return link

    async def _open_all(
        self,
        route: Route,
        stages: range,
        deadline_s: float,
        passes_from: Callable[[int], int],
        *,
        waits: bool = False,
    ) -> list[Link]:
        asked: list[Link] = []
        try:
            requests = [self._request(route, index, passes_from(index), waits) for index in stages]
            return await self._ask_all(route, stages, deadline_s, requests, asked)
        except BaseException:
            self.take_back(asked)
            raise

    async def _ask_all(
        self, route: Route, stages: range, deadline_s: float, requests: Sequence[Open], asked: list[Link]
    ) -> list[Link]:
        results = await asyncio.gather(
            *(
                self._open_stage(route, index, deadline_s, request, asked)
                for index, request in zip(stages, requests, strict=True)
            ),
            return_exceptions=True,
        )
        links = [result for result in results if isinstance(result, Link)]
        errors = [result for result in results if isinstance(result, BaseException)]
        # a node that opened and died while others still did: nobody listens for that yet
        errors += [link.lost.about(link.peer) for link in links if link.lost is not None]
        if errors:
            raise errors[0]
        return links

    async def replace(
        self, start: int, end: int, hops: Route, *, passes_from: int, deadline_s: float, warm: Link | None = None
    ) -> None:
        """Put `hops`, which compute the same blocks, in the place of the stages [start, end) of the route.

        They get everything that the stage before them has sent, and pass on what comes at `passes_from` or after.
        `warm`: the link to the only one of them, if it is a spare that has computed along; it gets what it lacks. Of
        the first stages' place nothing is sent here: the caller replays. Raises what the new stages or their neighbours
        answer, blaming them; the route is as it was then.
        """
        route = (*self.route[:start], *hops, *self.route[end:])
        old = self._open[start:end]
        taking = {hop.peer for hop in hops}
        self.take_back([link for link in old if link.peer in taking])  # it begins again
        last = start + len(hops) - 1
        opened: list[Link] = []
        self._taking = route
        try:
            if warm is not None:
                opened = [warm]
            else:
                opened = await self._open_all(
                    route,
                    range(start, last + 1),
                    deadline_s,
                    lambda index: passes_from if index == last else 0,
                    waits=True,
                )
            links = [*self._open[:start], *opened, *self._open[end:]]
            # whoever comes after has to know first whom to listen to
            if last + 1 < len(route):
                await self._reroute(links[last + 1], self._neighbours_of(route, last + 1), deadline_s)
            if warm is not None:
                message = msgspec.structs.replace(self._neighbours_of(route, start), passes_from=passes_from)
                await self._reroute(warm, message, deadline_s)
            if start:
                position = passes_from if warm is not None else 0
                message = self._neighbours_of(route, start - 1)
                message = msgspec.structs.replace(message, again=True, position=position)
                await self._reroute(links[start - 1], message, deadline_s)
        except BaseException:
            self.take_back(opened)
            raise
        finally:
            self._taking = ()
        self.route, self._open = route, links
        self.take_back([link for link in old if link.peer not in taking])

    async def lead_spare(self, link: Link, start: int, end: int, deadline_s: float) -> None:
        """Tell a spare for the stages [start, end) who their neighbours are by now. Raises what it answers."""
        hop = Hop(link.peer, self.route[start].blocks, ())
        message = self._neighbours_of((*self.route[:start], hop, *self.route[end:]), start)
        await self._reroute(link, msgspec.structs.replace(message, passes_from=self.max_tokens), deadline_s)

    def _neighbours_of(self, route: Route, index: int) -> Reroute:
        before, after = neighbours(route, index)
        return Reroute(
            self.id,
            before.peer if before else None,
            after.peer if after else None,
            after.addresses if after else (),
        )

    async def _reroute(self, link: Link, message: Reroute, deadline_s: float) -> None:
        try:
            await link.reroute(message, deadline_s)
        except BsnsError as error:
            raise error.about(link.peer) from None

    def take_back(self, links: Sequence[Link]) -> None:
        """Close on stages that were asked: one that has not answered may have opened the session all the same."""
        for link in links:
            with contextlib.suppress(BsnsError):
                link.post(Close(self.id))

    async def _open_stage(self, route: Route, index: int, deadline_s: float, request: Open, asked: list[Link]) -> Link:
        hop = route[index]
        try:
            async with asyncio.timeout(deadline_s):
                link = await self._links.to(hop.peer, hop.addresses)
                asked.append(link)
                try:
                    await link.open(request, deadline_s)
                except CacheFull:
                    asked.remove(link)  # nothing is open there, and it keeps our place in line
                    self._in_line.append(link)
                    raise
                return link
        except TimeoutError:
            raise PeerTimedOut(f"node {hop.peer} was not reached within {deadline_s:g} s").about(hop.peer) from None
        except BsnsError as error:
            named = error if hop.peer in error.message else type(error)(f"node {hop.peer}: {error.message}")
            # a stage knows of its neighbours only; whom else it names, it made up
            known = {neighbour.peer for neighbour in neighbours(route, index) if neighbour is not None}
            named.peer = error.peer if error.peer in known else hop.peer
            raise named from None

    def _request(self, route: Route, index: int, passes_from: int, waits: bool) -> Open:
        hop = route[index]
        before, after = neighbours(route, index)
        return Open(
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
            takes=self._codec(route, index),
            gives=self._codec(route, index + 1),
            waits=waits,
            trace=self.trace,
            at_once=at_once(route),
        )

    def park(self, tokens: int) -> None:
        """Let every stage keep the first so many tokens as long as nobody else needs their room."""
        self.max_tokens = tokens
        for link in self._open:
            with contextlib.suppress(BsnsError):  # that it is gone shows when the session is wanted again
                link.post(Resize(self.id, tokens, tokens, parked=True))

    async def resume(self, max_tokens: int, keep: int, deadline_s: float) -> None:
        """Have so much room on every stage again, of whose tokens the first `keep` stand. Raises what a stage answers,
        blaming it."""
        message = Resize(self.id, max_tokens, keep, trace=self.trace)
        outcomes = await asyncio.gather(
            *(link.resize(message, deadline_s) for link in self._open), return_exceptions=True
        )
        for link, outcome in zip(self._open, outcomes, strict=True):
            if isinstance(outcome, BsnsError):
                raise outcome.about(link.peer)
            if outcome is not None:
                raise outcome
        self.max_tokens = max_tokens

    async def close(self, deadline_s: float = 2.0) -> None:
        """Free the session on every stage that still answers; the others free it when they see our stream gone."""
        links, self._open = self._open, []
        outcomes: Sequence[int | BaseException] = await asyncio.gather(
            *(link.close_session(self.id, deadline_s) for link in links if link.lost is None), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BsnsError):
                log.info("a node did not confirm the end of a session", session=str(self.id), error=outcome.message)
            elif isinstance(outcome, BaseException):
                raise outcome


def neighbours(route: Route, start: int, end: int | None = None) -> tuple[Hop | None, Hop | None]:
    """Who comes before a stage, or the stages [start, end), and who after; the client is nobody."""
    end = start + 1 if end is None else end
    return route[start - 1] if start else None, route[end] if end < len(route) else None
