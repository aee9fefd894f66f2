"""The streams of a stage's clients: who is told what, and whose sessions end with a stream."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from bsns.core.errors import BsnsError, PeerLost
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.frames import Buffer, Message
from bsns.protocol.inference import Failure
from bsns.transport.port import Stream
from bsns.worker.sessions import Session, SessionTable

log = structlog.get_logger(__name__)


class Clients:
    """Those whose sessions run here."""

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions
        self._streams: dict[PeerId, Stream] = {}
        self._opened_on: dict[SessionId, Stream] = {}

    def opened(self, session: Session, stream: Stream) -> None:
        """A client has opened a session: it is told over this stream from now on."""
        self._streams[session.client] = stream
        self._opened_on[session.id] = stream

    def opened_elsewhere(self, session: Session, stream: Stream) -> bool:
        """Whether it was opened on another stream than this one."""
        return self._opened_on.get(session.id) is not stream

    def free(self, session: SessionId) -> None:
        self._opened_on.pop(session, None)

    def left(self, stream: Stream) -> list[SessionId]:
        """A stream has ended: closes the sessions that end with it."""
        if self._streams.get(stream.peer) is stream:
            del self._streams[stream.peer]
            return self._sessions.close_all_of(stream.peer)
        # a client that has come anew goes on with what it has opened since
        gone = [session for session, opened_on in self._opened_on.items() if opened_on is stream]
        for session in gone:
            self._sessions.close(session, stream.peer)
        return gone

    def of_step(self, session: SessionId, sender: Stream) -> Stream:
        """Who must hear of a failed step: the session's client, but of a step that is none of its own, its sender."""
        held = self._sessions.get(session)
        if held is None or sender.peer not in (held.client, held.previous):
            return sender
        return self._streams.get(held.client, sender)

    def report(self, session: Session, error: BsnsError) -> None:
        """Tell a session's client that it failed."""
        report(self._streams.get(session.client), session.id, error)

    def post(self, client: PeerId, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        post(self._streams.get(client), message, buffers)


def report(stream: Stream | None, session: SessionId, error: BsnsError) -> None:
    """Tell whoever is there that a session failed."""
    log.info("a session failed", session=str(session), code=error.code, reason=error.message, about=error.peer)
    post(stream, Failure(session, error.code, error.message, error.peer))


def post(stream: Stream | None, message: Message, buffers: Sequence[Buffer] = ()) -> None:
    """Send to a client; one that is gone needs no telling, its sessions are freed when its stream ends."""
    if stream is None:
        return
    try:
        stream.post(message, buffers)
    except PeerLost as lost:
        about = {"session": str(session)} if (session := getattr(message, "session", None)) is not None else {}
        what = type(message).__name__
        log.info("nobody there to hear", peer=stream.peer, message=what, reason=lost.message, **about)
