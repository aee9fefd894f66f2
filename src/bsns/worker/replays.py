"""Replays: a session's journal on its way to another node, once to a new next stage or all along to a spare."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from bsns.core.errors import BsnsError, PeerFailed
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.codecs import coded
from bsns.protocol.inference import Part, Step
from bsns.worker.relay import Relay
from bsns.worker.sessions import Session
from bsns.worker.tally import Tally

MAX_REWINDS = 64
"""How often a replay goes back to what was computed anew: a session's stages may be in repair at several places."""

Answer = Callable[[BsnsError | None], None]
"""Told once that the peer is reached, or why it is not."""
Report = Callable[[Session, BsnsError], None]
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Replay:
    """One journal on its way to one peer. What is computed meanwhile follows through the journal."""

    def __init__(self, session: Session, peer: PeerId, addresses: Sequence[str], position: int, onward: bool) -> None:
        self.session = session
        self.peer = peer
        self.addresses = tuple(addresses)
        self.position = position
        """How far it has come."""
        self.onward = onward
        """Whether it goes to the next stage: then it ends where it has caught up, and steps go there themselves."""
        self.rewinds = 0
        """Since the journal was last overwritten further on than ever before: who makes progress is no ring."""
        self.furthest = -1
        self.connected = False
        self.written = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Replays:
    """At most one replay to the next stage and one mirror to a spare for each session.

    A mirror waits where its peer does not keep up: what is to come stays in the journal, and nothing piles up.
    """

    def __init__(
        self, relay: Relay, spawn: Spawn, report: Report, *, dtype: str, hidden_size: int, tally: Tally
    ) -> None:
        """`report` is told of a peer that could not be sent any more."""
        self._relay = relay
        self._spawn = spawn
        self._report = report
        self._dtype = dtype
        self._hidden_size = hidden_size
        self._tally = tally
        self._onward: dict[SessionId, Replay] = {}
        self._mirrors: dict[SessionId, Replay] = {}

    def __len__(self) -> int:
        return len(self._onward) + len(self._mirrors)

    def lead(self, session: Session, peer: PeerId, addresses: Sequence[str], position: int, answer: Answer) -> None:
        """Make a peer the session's next stage and send it what it lacks: from `position` on where it was mirrored to,
        though not less than the mirror has left out, and everything otherwise. Whatever was begun before is over."""
        self._end(self._onward, session.id)
        mirror = self._mirrors.get(session.id)
        if mirror is None or mirror.peer != peer or not mirror.connected:
            if mirror is not None and mirror.peer == peer:
                self._end(self._mirrors, session.id)
            self._begin(self._onward, Replay(session, peer, addresses, 0, onward=True), answer)
            return
        del self._mirrors[session.id]
        mirror.onward, mirror.position = True, min(mirror.position, position)
        self._onward[session.id] = mirror
        self._turn(mirror)
        mirror.written.set()
        answer(None)

    def mirror(self, session: Session, peer: PeerId, addresses: Sequence[str], position: int, answer: Answer) -> None:
        """Send a spare what the next stage has been sent from `position` on, and from now on what it gets."""
        self.end_mirror(session.id)
        self._begin(self._mirrors, Replay(session, peer, addresses, position, onward=False), answer)

    def end_mirror(self, session: SessionId) -> None:
        self._end(self._mirrors, session)

    def end(self, session: SessionId) -> None:
        """End all that a session has."""
        self._end(self._onward, session)
        self._end(self._mirrors, session)

    def mirrored_to(self, peer: PeerId) -> list[Session]:
        """The sessions that are mirrored to a peer."""
        return [mirror.session for mirror in self._mirrors.values() if mirror.peer == peer]

    def written(self, session: Session, position: int) -> bool:
        """A step's output stands in the journal. Whether the next stage gets it from there."""
        mirror, replay = self._mirrors.get(session.id), self._onward.get(session.id)
        if mirror is not None:
            self._follow(mirror, position)
        if replay is None or not replay.connected:
            return False
        self._follow(replay, position)
        return True

    def _follow(self, replay: Replay, position: int) -> None:
        """What was computed anew is sent anew, unless whoever comes after has it."""
        replay.written.set()
        position = max(position, replay.session.passes_from)
        if position >= replay.position:
            return
        replay.position, replay.rewinds = position, replay.rewinds + 1
        if position > replay.furthest:
            replay.furthest, replay.rewinds = position, 0
        if replay.rewinds <= MAX_REWINDS:
            return
        # a ring of stages would keep itself busy for ever
        self._end(self._onward if replay.onward else self._mirrors, replay.session.id)
        error = PeerFailed(f"a replay was overtaken {MAX_REWINDS} times by what it sends")
        self._report(replay.session, error if replay.onward else error.about(replay.peer))

    def _begin(self, held: dict[SessionId, Replay], replay: Replay, answer: Answer) -> None:
        held[replay.session.id] = replay
        replay.task = self._spawn(self._run(replay, answer))

    def _end(self, held: dict[SessionId, Replay], session: SessionId) -> None:
        replay = held.pop(session, None)
        if replay is not None and replay.task is not None:
            replay.task.cancel()

    def _turn(self, replay: Replay) -> None:
        session = replay.session
        session.next, session.next_addresses = replay.peer, replay.addresses
        # what the lost stage had not passed on, this one has to
        session.passes_from = min(session.passes_from, replay.position)

    async def _run(self, replay: Replay, answer: Answer) -> None:
        try:
            await self._relay.connect(replay.peer, replay.addresses, replay.session.client)
        except BsnsError as error:
            self._forget(replay)
            answer(error.about(replay.peer))
            return
        replay.connected = True
        if replay.onward:
            self._turn(replay)
        answer(None)
        try:
            await self._send(replay)
        except BsnsError as error:
            self._report(replay.session, error.about(replay.peer))
        self._forget(replay)

    async def _send(self, replay: Replay) -> None:
        """To the end of the journal, and a mirror beyond it as long as it is wanted. Raises PeerLost."""
        session, journal = replay.session, replay.session.journal
        assert journal is not None
        while True:
            replay.written.clear()
            while (again := journal.step(replay.position)) is not None:
                rows, wanted, turn = again
                part = Part(session.id, replay.position, len(rows) // journal.row_bytes, wanted, turn=turn)
                replay.position += part.rows
                tensors = (coded("hidden", self._dtype, (part.rows, self._hidden_size), session.gives),)
                await self._relay.send(replay.peer, Step((part,), tensors), [rows])
                self._tally.sent_bytes[session.gives] += len(rows)
            if replay.onward:
                self._tally.replays += 1
                return
            await replay.written.wait()

    def _forget(self, replay: Replay) -> None:
        held = self._onward if replay.onward else self._mirrors
        if held.get(replay.session.id) is replay:
            del held[replay.session.id]
