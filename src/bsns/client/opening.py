"""Opening sessions: on the best route, around peers that refuse, and in turn where there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bsns.client.finding import Blame, ChooseCodec, FindRoute, Release
from bsns.client.links import Links
from bsns.client.session import Session
from bsns.core.errors import (
    BsnsError,
    CacheFull,
    CacheTooSmall,
    PeerError,
    PeerLost,
    PeerTimedOut,
    PeerUnreachable,
    SwarmError,
)
from bsns.core.ids import ModelId, PeerId
from bsns.transport.clock import Clock

UNREACHED_S = 6.0
AGAIN_S = 0.5
"""Whom a node could not dial once, for it was just coming up, it does not dial again for 5 s (libp2p's backoff)."""

PASSING = (PeerUnreachable, PeerLost, PeerTimedOut)
"""What a node that is there may look like for a moment: coming up, or busier than it ever was."""
OPEN_S = 5.0
"""What one attempt to open a session may take: then whoever did not answer is avoided in the next."""
ROOM_S = 6.0
"""How long an answer that finds no room waits for some, before it is refused."""
FIRST_LOOK_S = 0.05
MOST_LOOK_S = 0.3
"""How long until the client asks for room again, longer each time; less than what a place in a line is kept for."""


class Opener:
    """Opens a client's sessions."""

    def __init__(
        self,
        links: Links,
        find_route: FindRoute,
        release: Release,
        blame: Blame,
        clock: Clock,
        *,
        model: ModelId,
        dtype: str,
        choose_codec: ChooseCodec,
        deadline_s: float,
    ) -> None:
        """`deadline_s`: when a session that could not be opened is given up."""
        self._links = links
        self._find_route = find_route
        self._release = release
        self._blame = blame
        self._clock = clock
        self._model = model
        self._dtype = dtype
        self._choose_codec = choose_codec
        self._deadline_s = deadline_s
        self._waiting = asyncio.Lock()
        """Held by the answer that asks for room again: the others come after it in their order."""

    async def open(self, max_tokens: int, trace: str = "") -> Session:
        """A session on the best route, as soon as there is room for it. Raises CacheFull if there is none within
        `ROOM_S`, at once where there cannot be any, and what `_open_somewhere` does."""
        give_up_s = self._clock.now_s() + self._deadline_s
        refusal: CacheFull | None = None
        if not self._waiting.locked():  # otherwise others wait, and come first
            try:
                return await self._open_somewhere(max_tokens, give_up_s, trace)
            except CacheTooSmall:
                raise
            except CacheFull as error:
                refusal = error
        refused: list[Session] = []
        try:
            async with asyncio.timeout(max(0.0, min(ROOM_S, give_up_s - self._clock.now_s()))), self._waiting:
                look_s = FIRST_LOOK_S
                while True:
                    before, refused = refused, []
                    try:
                        session = await self._open_somewhere(max_tokens, give_up_s, trace, refused)
                        _leave_line(refused)
                        return session
                    except CacheTooSmall:
                        raise
                    except CacheFull as error:
                        refusal = error
                    finally:  # a place where it was not asked for again would keep room from those behind it
                        _leave_line(before)
                    await asyncio.sleep(look_s)
                    look_s = min(2 * look_s, MOST_LOOK_S)
        except TimeoutError:
            why = refusal.message if refusal is not None else "others wait for room before this answer"
            raise CacheFull(f"the swarm is full: {why}; ask again later, or add a node") from None

    async def _open_somewhere(
        self, max_tokens: int, give_up_s: float, trace: str = "", refused: list[Session] | None = None
    ) -> Session:
        """A session on the best route; a peer that refuses or does not answer is avoided in the next try. None begins
        after `give_up_s`. Where somebody was silent and nobody else is left, all are tried again for a while.

        `refused` is for one who stands in line: it gets the sessions that could not be opened. Stages that announced
        that they are full are asked too, for that may be over.
        """
        in_line = refused is not None
        began_s = self._clock.now_s()
        avoid: set[PeerId] = set()
        refusal: BsnsError | None = None
        while True:
            try:
                try:
                    route = await self._find_route(max_tokens, avoid, None, bool(avoid) and not in_line)
                except CacheFull:
                    if not in_line or avoid:
                        raise
                    route = await self._find_route(0, avoid, None, False)
            except (SwarmError, PeerError) as error:
                if isinstance(refusal, PASSING) and self._clock.now_s() - began_s < UNREACHED_S:
                    avoid.clear()
                    await asyncio.sleep(AGAIN_S)
                    continue
                raise refusal or error from None  # the refusal says more than that nobody is left
            session = Session(
                self._links,
                route,
                model=self._model,
                dtype=self._dtype,
                max_tokens=max_tokens,
                choose_codec=self._choose_codec,
                trace=trace,
            )
            try:
                left_s = max(AGAIN_S, give_up_s - self._clock.now_s())
                await session.open(min(OPEN_S, left_s), in_line=in_line)
            except BsnsError as error:  # of whatever kind: it is what a peer of this route said, or how it failed
                self._release(route)
                if refused is not None:
                    refused.append(session)
                refusal = error
                if error.peer is not None:
                    self._blame(error.peer, error)
                blamed = {error.peer} if error.peer is not None else {hop.peer for hop in route}
                if self._clock.now_s() > give_up_s or blamed <= avoid:
                    raise
                avoid |= blamed
            except BaseException:
                self._release(route)
                raise
            else:
                return session


def _leave_line(sessions: Sequence[Session]) -> None:
    for session in sessions:
        session.leave_line()
