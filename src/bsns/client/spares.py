"""Warm spares: nodes that compute a session's stages along, so that a lost one is replaced without computing it again.

For each stage of an answer's route there is one, where there is a node for it. It has the session open, gets what the
stage gets (from the stage before, which mirrors what it sends on; before the first from the client itself), and passes
nothing on. A spare that fails, or does not keep up, is no spare any more; an answer never waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import structlog

from bsns.client.finding import Blame, FindRoute, Release
from bsns.client.links import Link
from bsns.client.reader import CHUNK_ROWS, Reader
from bsns.client.session import neighbours
from bsns.client.watch import PING_S
from bsns.core.errors import BsnsError, CacheFull, PeerSlow, SwarmError, UnknownSession
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Close, Mirror
from bsns.routing.chain import Hop

log = structlog.get_logger(__name__)

ANSWER_S = 3.0
"""What a spare, or the stage before it, may take to answer."""
LOOK_S = 2.0
"""How often spares are asked how far they are, and missing ones looked for."""
MOST_BEHIND = 32
"""A spare is too slow that is further behind than these tokens, and falls back further."""

SendRows = Callable[[Reader, Link, int, int], Awaitable[None]]
"""Sends a reader's tokens [start, end) to a node, which is to give nothing back."""
Between = tuple[PeerId | None, PeerId | None]


@dataclass(slots=True, eq=False)
class Spare:
    """One node that computes along."""

    hop: Hop
    between: Between
    """Its neighbours, as it has been told."""
    link: Link | None = None
    """Once the session is open there."""
    leading: bool = False
    """Whether it is being told of other neighbours just now."""
    behind: float = math.inf
    """How many tokens it lacked when it was asked last."""
    sent: int = 0
    """Before the first stage: how many tokens the client has sent it."""
    sending: int = 0
    """How many it will have been sent when what is being sent is."""
    feeding: asyncio.Task[None] | None = None


@dataclass(slots=True)
class _Held:
    """What one reader has."""

    spares: dict[PeerId, Spare] = field(default_factory=dict)
    had: set[PeerId] = field(default_factory=set)
    """Whoever was a spare: what is still said of them is late."""
    unfit: set[PeerId] = field(default_factory=set)
    """Who has failed as one, on the route as it is."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    fed: asyncio.Event = field(default_factory=asyncio.Event)
    keeper: asyncio.Task[None] | None = None


class Spares:
    """The warm spares of a client's sessions."""

    def __init__(self, find_route: FindRoute, release: Release, blame: Blame, send_rows: SendRows) -> None:
        self._find_route = find_route
        self._release = release
        self._blame = blame
        self._send_rows = send_rows
        self._held: dict[SessionId, _Held] = {}

    def keep(self, reader: Reader) -> None:
        """See to it from now on that each stage of the reader's route has a spare."""
        held = self._held[reader.session.id] = _Held()
        held.keeper = asyncio.create_task(self._keep(reader, held), context=reader.context)

    async def end(self, reader: Reader) -> None:
        """Free the session on its spares."""
        held = self._held.pop(reader.session.id, None)
        if held is None:
            return
        if held.keeper is not None:
            held.keeper.cancel()
            await asyncio.gather(held.keeper, return_exceptions=True)
        for spare in list(held.spares.values()):
            self._drop(reader, held, spare)

    def take(self, reader: Reader, start: int, end: int) -> Spare | None:
        """The spare that can take the place of the stages [start, end), if there is one. It is no spare any more."""
        held, route = self._held.get(reader.session.id), reader.session.route
        if held is None:
            return None
        for spare in held.spares.values():
            ready = spare.link is not None and spare.link.lost is None and not spare.leading
            if ready and _place(reader, spare) == (start, end) and spare.hop.peer not in {hop.peer for hop in route}:
                del held.spares[spare.hop.peer]
                _stop_feeding(spare)
                return spare
        return None

    def give_back(self, reader: Reader, spare: Spare) -> None:
        """A spare that was taken could not take its place."""
        held = self._held.get(reader.session.id)
        if held is not None:
            held.unfit.add(spare.hop.peer)
        self._end_mirror(reader, spare)

    def changed(self, reader: Reader, taken: Collection[PeerId] = ()) -> None:
        """The reader's route is another, or is to be: `taken` compute stages of it, and are no spares any more."""
        held = self._held.get(reader.session.id)
        if held is None:
            return
        held.unfit.clear()
        held.news.set()
        for peer in taken:
            if peer in held.spares:
                self._drop(reader, held, held.spares[peer])

    def unready(self, reader: Reader) -> set[PeerId]:
        """Spares that are being asked just now, and cannot be asked for anything else."""
        held = self._held.get(reader.session.id)
        spares = held.spares.values() if held is not None else ()
        return {spare.hop.peer for spare in spares if spare.link is None or spare.leading}

    def fed(self, reader: Reader, position: int) -> None:
        """The reader's first stage is sent something from this position on: what was there before is no more."""
        held = self._held.get(reader.session.id)
        if held is not None:
            for spare in held.spares.values():
                spare.sent, spare.sending = min(spare.sent, position), min(spare.sending, position)
            held.fed.set()

    def heard(self, reader: Reader, teller: PeerId, error: BsnsError) -> bool:
        """Whether what a node says of a session is about a spare, or comes from one: it does not concern the route."""
        held = self._held.get(reader.session.id)
        about = error.peer or teller
        route = {hop.peer for hop in reader.session.route}
        if held is None or (teller in route and (about in route or about not in held.had)):
            return False
        if teller not in route and teller not in held.spares:
            return False
        if about in held.spares and (teller in route or teller == about):
            self._fail(reader, held, held.spares[about], error)
        return True

    def lost(self, reader: Reader, peer: PeerId, error: BsnsError) -> None:
        """The link to a node is gone."""
        held = self._held.get(reader.session.id)
        if held is not None and peer in held.spares:
            self._fail(reader, held, held.spares[peer], error)

    async def _keep(self, reader: Reader, held: _Held) -> None:
        while True:
            held.news.clear()
            try:
                if reader.mending is None:
                    await self._tend(reader, held)
            except Exception:
                log.exception("keeping spares failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await held.news.wait()

    async def _tend(self, reader: Reader, held: _Held) -> None:
        """Bring the spares to what the route is now, and look after them."""
        route = reader.session.route
        work: list[tuple[Spare, Callable[[], Coroutine[Any, Any, None]]]] = []
        for spare in list(held.spares.values()):
            place = _place(reader, spare)
            if place is None or spare.hop.peer in {hop.peer for hop in route}:
                self._drop(reader, held, spare)
            elif spare.between != _between(reader, *place):
                work.append((spare, partial(self._lead, reader, held, spare, *place)))
            else:
                work.append((spare, partial(self._look, reader, spare)))
        covered = {spare.hop.blocks for spare in held.spares.values()}
        for index, hop in enumerate(route):
            if hop.blocks in covered:
                continue
            chosen = await self._choose(reader, held, index)
            if chosen is not None:
                work.append((chosen, partial(self._enlist, reader, held, chosen, index)))
        await asyncio.gather(*(self._try(reader, held, spare, what) for spare, what in work))

    async def _try(
        self, reader: Reader, held: _Held, spare: Spare, what: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await what()
        except BsnsError as error:
            self._fail(reader, held, spare, error)

    async def _choose(self, reader: Reader, held: _Held, index: int) -> Spare | None:
        """A single node for a stage, one that has no other part in the session."""
        session = reader.session
        blocks = session.route[index].blocks
        others = {hop.peer for hop in session.route} | held.spares.keys() | held.unfit
        others |= reader.former | reader.lost.keys()
        try:
            hops = await self._find_route(session.max_tokens, others, blocks, False)
        except (SwarmError, CacheFull):
            return None
        if len(hops) != 1:
            self._release(hops)
            return None
        spare = Spare(hops[0], _between(reader, index, index + 1))
        held.spares[spare.hop.peer] = spare
        held.had.add(spare.hop.peer)
        return spare

    async def _enlist(self, reader: Reader, held: _Held, spare: Spare, index: int) -> None:
        """Open the session on a spare, and have it sent what the stage gets."""
        session = reader.session
        link = await session.open_spare(index, index + 1, spare.hop, ANSWER_S)
        if held.spares.get(spare.hop.peer) is not spare:
            session.take_back([link])
            return
        spare.link = link
        await self._have_mirrored(reader, held, spare, 0)

    async def _lead(self, reader: Reader, held: _Held, spare: Spare, start: int, end: int) -> None:
        """A neighbour was replaced: who comes now sends what the spare has not had yet."""
        link = spare.link
        if link is None:
            return
        between = _between(reader, start, end)
        spare.leading = True
        try:
            await reader.session.lead_spare(link, start, end, ANSWER_S)
            there = await link.where(reader.session.id, ANSWER_S)
            spare.between = between
            await self._have_mirrored(reader, held, spare, max(0, min(there.given, reader.through)))
        finally:
            spare.leading = False

    async def _have_mirrored(self, reader: Reader, held: _Held, spare: Spare, position: int) -> None:
        """Have a spare sent what there is from a position on, and what follows. Raises what the stage before says."""
        if spare.between[0] is None:
            # one that was given up meanwhile is fed no more: nobody would ever end that
            if spare.feeding is None and held.spares.get(spare.hop.peer) is spare:
                spare.feeding = asyncio.create_task(self._feed(reader, held, spare))
            return
        before = _before(reader, spare)
        if before is not None:  # otherwise it has been replaced meanwhile
            message = Mirror(reader.session.id, spare.hop.peer, spare.hop.addresses, position)
            await before.mirror(message, ANSWER_S)

    async def _feed(self, reader: Reader, held: _Held, spare: Spare) -> None:
        """Before the first stage the client itself sends a spare what the stage has been sent."""
        assert spare.link is not None
        try:
            while True:
                held.fed.clear()
                while spare.sent < reader.sent:
                    spare.sending = min(spare.sent + CHUNK_ROWS, reader.sent)
                    await self._send_rows(reader, spare.link, spare.sent, spare.sending)
                    spare.sent = spare.sending
                await held.fed.wait()
        except BsnsError as error:
            spare.feeding = None
            self._fail(reader, held, spare, error)

    async def _look(self, reader: Reader, spare: Spare) -> None:
        """Raises what the spare answers, or PeerSlow."""
        if spare.link is None:
            return
        there = await spare.link.where(reader.session.id, PING_S)
        if there.given < 0:
            raise UnknownSession(f"node {spare.hop.peer} does not have the session any more").about(spare.hop.peer)
        behind = reader.through - there.done
        if behind > max(MOST_BEHIND, spare.behind):
            raise PeerSlow(f"node {spare.hop.peer} does not keep up").about(spare.hop.peer)
        spare.behind = behind

    def _fail(self, reader: Reader, held: _Held, spare: Spare, error: BsnsError) -> None:
        """It is no spare any more, nor will it be one on this route."""
        log.info("a spare is lost", blocks=str(spare.hop.blocks), peer=spare.hop.peer, reason=error.message)
        held.unfit.add(spare.hop.peer)
        if error.peer == spare.hop.peer:
            self._blame(spare.hop.peer, error)
        self._drop(reader, held, spare)

    def _drop(self, reader: Reader, held: _Held, spare: Spare) -> None:
        """Free a spare."""
        if held.spares.get(spare.hop.peer) is not spare:
            return
        del held.spares[spare.hop.peer]
        _stop_feeding(spare)
        self._end_mirror(reader, spare)
        if spare.link is not None:
            with contextlib.suppress(BsnsError):
                spare.link.post(Close(reader.session.id))
        self._release((spare.hop,))
        held.news.set()

    def _end_mirror(self, reader: Reader, spare: Spare) -> None:
        before = _before(reader, spare)
        if before is not None:
            with contextlib.suppress(BsnsError):
                before.post(Mirror(reader.session.id, None))


def _place(reader: Reader, spare: Spare) -> tuple[int, int] | None:
    """The stages [start, end) that a spare can take the place of, if the route has such."""
    starts = {hop.blocks.start: index for index, hop in enumerate(reader.session.route)}
    ends = {hop.blocks.end: index + 1 for index, hop in enumerate(reader.session.route)}
    start, end = starts.get(spare.hop.blocks.start), ends.get(spare.hop.blocks.end)
    return (start, end) if start is not None and end is not None else None


def _between(reader: Reader, start: int, end: int) -> Between:
    before, after = neighbours(reader.session.route, start, end)
    return before.peer if before else None, after.peer if after else None


def _before(reader: Reader, spare: Spare) -> Link | None:
    """The link to the stage that sends a spare what it gets."""
    return next((link for link in reader.session.links if link.peer == spare.between[0]), None)


def _stop_feeding(spare: Spare) -> None:
    if spare.feeding is not None:
        spare.feeding.cancel()
        spare.feeding = None
