"""Parking: an answer's session is kept for a prompt that goes on where it ended, and taken up again for that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from bsns.client.finding import Blame, Release
from bsns.client.kept import Kept, KeptSessions
from bsns.client.session import Session
from bsns.core.errors import BsnsError, PeerError
from bsns.core.ids import PeerId, SessionId

log = structlog.get_logger(__name__)

RESUME_S = 2.0
"""What the stages of a kept session may take to answer; then another is opened."""


class Parking:
    """The sessions that a client keeps."""

    def __init__(
        self, most: int, claim: Release, blame: Blame, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        """At most `most` sessions. `claim` is told of the route of one that is taken up; `spawn` runs what nobody waits
        for."""
        self.keeps = most > 0
        self._kept = KeptSessions(most)
        self._claim = claim
        self._blame = blame
        self._spawn = spawn
        self._trailing: dict[SessionId, tuple[int, asyncio.Event]] = {}
        """Of answers that have ended while guesses are on their way: the turn of the last of them, and that it came."""

    async def resume(
        self, tokens: Sequence[int], max_tokens: int, tenant: str, trace: str = ""
    ) -> tuple[Session, int] | None:
        """A kept session that holds how a prompt begins, with room for its answer, and how much it holds; if its stages
        still have it and the room."""
        found = self._kept.take(tokens, tenant)
        if found is None:
            return None
        kept, common = found
        kept.session.trace = trace
        try:
            await kept.session.resume(max_tokens, common, RESUME_S)
        except BaseException as error:
            self._spawn(kept.session.close())
            if isinstance(error, PeerError) and error.peer is not None:
                self._blame(error.peer, error)
            if not isinstance(error, BsnsError):
                raise
            log.info("a kept session could not go on", session=str(kept.session.id), reason=error.message)
            return None
        self._claim(kept.session.route)
        return kept.session, common

    def trails(self, session: SessionId, turn: int) -> None:
        """The answer has ended, and this turn is still on its way through the session's stages."""
        self._trailing[session] = turn, asyncio.Event()

    def came(self, session: SessionId, turn: int) -> None:
        """What a session that nobody reads any more has brought."""
        awaited, came = self._trailing.get(session, (None, None))
        if came is not None and turn == awaited:
            came.set()

    async def keep(self, session: Session, tokens: tuple[int, ...], tenant: str) -> None:
        """Keep a session whose stages hold these tokens, as soon as nothing is on its way through them."""
        if not await self._has_passed(session.id):
            await session.close()
            return
        session.park(len(tokens))
        for gone in self._kept.add(Kept(session, tokens, tenant)):
            await gone.session.close()

    def lose(self, peer: PeerId) -> None:
        """A node is gone, and with it what it held."""
        for kept in self._kept.lose(peer):
            self._spawn(kept.session.close())

    async def _has_passed(self, session: SessionId) -> bool:
        """Wait for what is still on its way: whether it is no more."""
        if session not in self._trailing:
            return True
        try:
            async with asyncio.timeout(RESUME_S):
                return await self._trailing[session][1].wait()
        except TimeoutError:
            return False
        finally:
            del self._trailing[session]
