"""The session table of a stage: admission, positions and expiry. Pure: time comes in as an argument."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, CacheFull, CacheTooSmall, NotHere, PositionGap, UnknownSession
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.inference import MAX_DEPTH, MAX_ROWS_PER_PART, Mirror, Open, Part, Reroute, Resize
from bsns.worker.journal import Journal
from bsns.worker.line import Line

MAX_PARKED = 256
SPARE_ROOM = 2
"""A session's caches could hold so many times what it reserves at first: a chat that goes on needs more each time.
Memory is taken as it is written, not before."""
MAX_ADDRESSES = 16
MAX_TEXT = 256
"""Letters in a peer id or an address: a session keeps them as long as it is open."""


@dataclass(slots=True)
class Session:
    """One session on this stage."""

    id: SessionId
    client: PeerId
    blocks: BlockRange
    max_tokens: int
    depth: int
    previous: PeerId | None
    next: PeerId | None
    next_addresses: tuple[str, ...]
    at_once: int = 1
    """How many stages of its route can compute at the same time."""
    end: int = 0
    """How many tokens the stage has been given; the next step may start here or anywhere before."""
    done: int = 0
    """How many of them it has computed."""
    seen_s: float = 0.0
    waiting: int = 0
    """How many rows it was given that have not run yet."""
    held: BlockRange | None = None
    """On which of the node's ranges it runs, to its end; `blocks` lie in it."""
    passes_from: int = 0
    """Outputs before this position are not passed on: the next stage has them."""
    journal: Journal | None = None
    """What was passed on, or would have been; the last stage of a route has none."""
    takes: str = RAW
    """The codec of what comes, and of what is sent on."""
    gives: str = RAW
    waited_since_s: float | None = None
    """Since when its client had stood in line for it."""
    room: int = 0
    """The most tokens that its caches could hold."""
    parked: bool = False
    """Whether it is between two answers, and may be evicted."""


class SessionTable:
    """All sessions of a node. Capacity is reserved when one opens, so that no running session is ever evicted.

    Sessions that are parked have what is left: they do not count, and the oldest make room for whoever needs it.

    A node that moves holds several ranges for a while and shares its cache among them. A new session runs on the first
    that covers its blocks, the newest first; a range that drains takes no new ones.
    """

    def __init__(
        self,
        *,
        model: ModelId,
        held: BlockRange,
        dtype: str,
        cache_tokens: int,
        context_tokens: int,
        max_sessions: int = 1024,
        idle_s: float = 600.0,
    ) -> None:
        self.model = model
        self._ranges = [held]
        self._draining: set[BlockRange] = set()
        self.dtype = dtype
        self.cache_tokens = cache_tokens
        self.context_tokens = context_tokens
        self.max_sessions = max_sessions
        self.idle_s = idle_s
        self._sessions: dict[SessionId, Session] = {}
        self._reserved = 0
        self._parked: dict[SessionId, Session] = {}
        """Those of them that are parked, the oldest first."""
        self._line = Line()
        self.evicted: Callable[[SessionId], None] = lambda session: None
        """Told of a parked session that is gone."""

    def __len__(self) -> int:
        return len(self._sessions) - len(self._parked)

    @property
    def parked(self) -> int:
        """How many sessions there are beside those that run."""
        return len(self._parked)

    @property
    def waiting_clients(self) -> int:
        """How many clients stood in line for room when one asked last."""
        return len(self._line)

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        """Every range that sessions run on, the one that new ones prefer first."""
        return tuple(self._ranges)

    @property
    def open_ranges(self) -> tuple[BlockRange, ...]:
        """Those of them that take new sessions."""
        return tuple(blocks for blocks in self._ranges if blocks not in self._draining)

    @property
    def reserved(self) -> int:
        """Tokens of cache that running sessions have."""
        return self._reserved

    def hold(self, blocks: BlockRange) -> None:
        """Let new sessions run on a range, which may be a further one, rather than on the others."""
        if blocks in self._ranges:
            self._ranges.remove(blocks)
        self._ranges.insert(0, blocks)
        self._draining.discard(blocks)

    def drain(self, blocks: BlockRange) -> None:
        """Let no new session run on a range; those that do go on."""
        assert blocks in self._ranges
        self._draining.add(blocks)
        for session in [session for session in self._parked.values() if session.held == blocks]:
            self._evict(session)

    def reopen(self, blocks: BlockRange) -> None:
        """Undo `drain`."""
        self._draining.discard(blocks)

    def release(self, blocks: BlockRange) -> bool:
        """Forget a range; False, and nothing happens, while sessions run on it."""
        if self.running_on(blocks):
            return False
        self._ranges.remove(blocks)
        self._draining.discard(blocks)
        return True

    def running_on(self, blocks: BlockRange) -> int:
        """How many sessions run on a range."""
        return sum(session.held == blocks for session in self._sessions.values())

    def resize(self, cache_tokens: int) -> None:
        """Promise another number of cache tokens in all; never fewer than are reserved already."""
        self.cache_tokens = max(cache_tokens, self._reserved)
        self._make_room()

    @property
    def cache_tokens_left(self) -> int:
        return self.cache_tokens - self._reserved

    def get(self, session: SessionId) -> Session | None:
        return self._sessions.get(session)

    def all(self) -> list[Session]:
        """Every open session, parked or not."""
        return list(self._sessions.values())

    def open(self, message: Open, client: PeerId, now_s: float) -> Session:
        """Admit a session. Raises NotHere, CacheFull or BadFrame; the table is unchanged then, but for who waits in
        line: there is no room either for whoever comes after those that want it."""
        if message.session in self._sessions:
            raise BadFrame(f"session {message.session} is open already")
        if message.model != self.model:
            raise NotHere(f"this node serves model {self.model}, not {message.model[:MAX_TEXT]}")
        if not 0 <= message.start < message.end:
            raise BadFrame(f"blocks {message.start}:{message.end} are no range")
        blocks = BlockRange(message.start, message.end)
        held = next((held for held in self.open_ranges if held.covers(blocks)), None)
        if held is None:
            there = " and ".join(map(str, self.open_ranges)) or "none"
            raise NotHere(f"this node holds blocks {there}, not {blocks}")
        if message.dtype != self.dtype:
            raise NotHere(
                f"this node computes in {self.dtype}, not {message.dtype[:16]}; start the client with that dtype"
            )
        unknown = {message.takes, message.gives} - CODECS.keys()
        if unknown:
            raise NotHere(f"this node knows codecs {', '.join(CODECS)}, not {min(unknown)[:16]}")
        if not 1 <= message.max_tokens <= self.context_tokens:
            raise BadFrame(f"{message.max_tokens} tokens asked for; the model's context is {self.context_tokens}")
        if not 1 <= message.depth <= MAX_DEPTH:
            raise BadFrame(f"a route of {message.depth} stages is impossible")
        if not 1 <= message.at_once <= message.depth:
            raise BadFrame(f"of {message.depth} stages {message.at_once} cannot compute at once")
        _check_names(message.previous_peer, message.next_peer, message.next_addresses)
        if not 0 <= message.passes_from <= message.max_tokens:
            raise BadFrame(f"a stage cannot pass on what lies beyond {message.max_tokens} tokens")
        waited_since_s = self._find_room(message, client, now_s)
        session = Session(
            message.session,
            client,
            blocks,
            message.max_tokens,
            message.depth,
            message.previous_peer,
            message.next_peer,
            message.next_addresses,
            at_once=message.at_once,
            seen_s=now_s,
            held=held,
            passes_from=message.passes_from,
            takes=message.takes,
            gives=message.gives,
            waited_since_s=waited_since_s,
            room=min(self.context_tokens, SPARE_ROOM * message.max_tokens),
        )
        self._sessions[message.session] = session
        self._reserved += message.max_tokens
        self._make_room()
        return session

    def change(self, message: Resize, client: PeerId, now_s: float) -> None:
        """Park a session, or give one more room. Raises UnknownSession, NotHere, CacheFull or BadFrame; the table is
        unchanged then."""
        session = self._sessions.get(message.session)
        if session is None or session.client != client:
            raise UnknownSession(f"no session {message.session} is open here for this peer; reopen it and replay")
        if not 1 <= message.max_tokens <= self.context_tokens:
            raise BadFrame(f"{message.max_tokens} tokens asked for; the model's context is {self.context_tokens}")
        if not 0 <= message.keep <= message.max_tokens:
            raise BadFrame(f"{message.keep} tokens cannot be kept in {message.max_tokens}")
        if message.max_tokens > session.room:
            raise CacheFull(f"{message.max_tokens} tokens asked for, of {session.room} that the session can hold")
        if message.parked:
            if message.max_tokens > session.max_tokens:
                raise BadFrame(f"a session of {session.max_tokens} tokens cannot be parked with {message.max_tokens}")
        elif session.held in self._draining:
            raise NotHere(f"this node is about to give up blocks {session.held}")
        else:
            others = self._reserved - (0 if session.parked else session.max_tokens)
            clients, tokens = self._line.ahead_of(client, now_s)
            left = self.cache_tokens - others
            if message.max_tokens + tokens > left or len(self) + session.parked + clients > self.max_sessions:
                raise CacheFull(f"{message.max_tokens} tokens of cache asked for, {left} of {self.cache_tokens} left")
        self._drop(session)
        session.max_tokens, session.parked, session.seen_s = message.max_tokens, message.parked, now_s
        session.end, session.done = (min(at, message.keep) for at in (session.end, session.done))
        self._sessions[session.id] = session
        if session.parked:
            self._parked[session.id] = session
        else:
            self._reserved += session.max_tokens
        self._make_room()

    def _make_room(self) -> None:
        """Evict parked sessions until the rest fits beside those that run."""
        parked = sum(session.max_tokens for session in self._parked.values())
        for session in list(self._parked.values()):
            if parked <= self.cache_tokens_left and len(self._parked) <= MAX_PARKED:
                return
            parked -= session.max_tokens
            self._evict(session)

    def _evict(self, session: Session) -> None:
        self._drop(session)
        self.evicted(session.id)

    def _find_room(self, message: Open, client: PeerId, now_s: float) -> float | None:
        """Since when the client has waited for this room. Raises CacheFull where there is none, or others wait for
        it."""
        asked = f"{message.max_tokens} tokens of cache asked for, {self.cache_tokens_left} of {self.cache_tokens} left"
        if message.max_tokens > self.cache_tokens:
            raise CacheTooSmall(f"{asked}; ask for fewer")
        clients, tokens = self._line.ahead_of(client, now_s)
        if message.max_tokens + tokens <= self.cache_tokens_left and len(self) + clients < self.max_sessions:
            return self._line.leave(client)
        if message.waits:
            self._line.join(client, message.session, message.max_tokens, now_s)
        others = f" and {clients} that wait" if clients else ""
        raise CacheFull(f"{asked} beside {len(self)} sessions{others}; ask for fewer or wait for one to end")

    def step(self, part: Part, codec: str, sender: PeerId, now_s: float, overwritten: int = 0) -> Session:
        """Check a step in a codec and note it; so many of the rows that wait it makes needless. Raises UnknownSession,
        PositionGap or BadFrame; nothing is noted then.

        A step of a session that belongs to others looks unknown, so that strangers cannot probe for sessions.
        """
        session = self._sessions.get(part.session)
        if session is None or session.parked or sender not in (session.client, session.previous):
            raise UnknownSession(f"no session {part.session} is open here for this peer; reopen it and replay")
        if not 1 <= part.rows <= MAX_ROWS_PER_PART or not 0 <= part.wanted <= part.rows or part.position < 0:
            raise BadFrame(f"a step of {part.rows} rows at {part.position}, {part.wanted} wanted, is impossible")
        if codec != session.takes:
            wrong = BadFrame(f"a step in {codec} for a session that was opened with {session.takes}")
            raise wrong if sender == session.client else wrong.about(sender)
        if len(part.hops) >= session.depth:
            raise BadFrame(f"a step that has passed {len(part.hops)} stages does not fit a route of {session.depth}")
        if part.position > session.end:
            raise PositionGap(f"the step starts at {part.position}, this stage has only {session.end} tokens; replay")
        if part.position + part.rows > session.max_tokens:
            raise BadFrame(f"the step ends at {part.position + part.rows}, beyond the {session.max_tokens} reserved")
        if session.waiting - overwritten + part.rows > session.max_tokens:
            raise BadFrame(
                f"{session.waiting} rows wait to be computed already, of {session.max_tokens} tokens reserved"
            )
        session.end = part.position + part.rows
        session.seen_s = now_s
        return session

    def reroute(self, message: Reroute, client: PeerId) -> Session:
        """The session that is to get other neighbours. Raises UnknownSession for one of others, or BadFrame."""
        session = self._own(message.session, client)
        if (session.next is None) != (message.next_peer is None):
            raise BadFrame("a stage that was the last of its route stays the last, and another does not become it")
        if not message.again and message.passes_from is None and message.next_peer != session.next:
            raise BadFrame("a next stage that is new has to be sent everything")
        if not (0 <= message.position <= session.max_tokens and 0 <= (message.passes_from or 0) <= session.max_tokens):
            raise BadFrame(f"a position beyond the {session.max_tokens} tokens reserved, or before the first")
        _check_names(message.previous_peer, message.next_peer, message.next_addresses)
        return session

    def mirror(self, message: Mirror, client: PeerId) -> Session:
        """The session that is to be mirrored. Raises UnknownSession for one of others, or BadFrame."""
        session = self._own(message.session, client)
        if session.next is None:
            raise BadFrame("the last stage of a route passes on nothing that a spare could need")
        if message.peer is not None and message.peer in (session.client, session.previous, session.next):
            raise BadFrame(f"{message.peer} takes part in the session, and is no spare for it")
        if not 0 <= message.position <= session.max_tokens:
            raise BadFrame(f"a mirror from {message.position} on, of {session.max_tokens} tokens reserved")
        _check_names(session.previous, message.peer, message.addresses)
        return session

    def _own(self, session: SessionId, client: PeerId) -> Session:
        held = self._sessions.get(session)
        if held is None or held.parked or held.client != client:
            raise UnknownSession(f"no session {session} is open here for this peer; reopen it and replay")
        return held

    def close(self, session: SessionId, client: PeerId) -> bool:
        """Forget a session at its client's wish, or its place in line; False if there was no session."""
        held = self._sessions.get(session)
        if held is None or held.client != client:
            self._line.give_up(client, session)
            return False
        self._drop(held)
        if held.waited_since_s is not None and held.end == 0:
            self._line.join(client, session, held.max_tokens, held.seen_s, held.waited_since_s)
        return True

    def close_all_of(self, client: PeerId) -> list[SessionId]:
        """Forget every session a client opened, because it is gone."""
        gone = [session for session in self._sessions.values() if session.client == client]
        for session in gone:
            self._drop(session)
        self._line.leave(client)
        return [session.id for session in gone]

    def onward_to(self, peer: PeerId) -> list[Session]:
        """The sessions whose next stage is `peer`."""
        return [session for session in self._sessions.values() if session.next == peer]

    def onward_from(self, peer: PeerId) -> list[Session]:
        """The sessions whose previous stage is `peer`."""
        return [session for session in self._sessions.values() if session.previous == peer]

    def expire(self, now_s: float, busy: Container[SessionId] = ()) -> list[SessionId]:
        """Forget the sessions that nobody has stepped for `idle_s`, but those that are busy."""
        stale = [s for s in self._sessions.values() if now_s - s.seen_s > self.idle_s and s.id not in busy]
        for session in stale:
            self._drop(session)
        return [session.id for session in stale]

    def check(self) -> None:
        """Invariant: what is reserved is what the running sessions reserved, and never more than there is; those that
        are parked have no more than what is left."""
        assert self._parked == {id_: session for id_, session in self._sessions.items() if session.parked}
        parked, every = (sum(s.max_tokens for s in held.values()) for held in (self._parked, self._sessions))
        assert self._reserved == every - parked
        assert 0 <= self._reserved <= self._reserved + parked <= self.cache_tokens
        assert len(self._parked) <= MAX_PARKED
        assert all(session.held in self._ranges for session in self._sessions.values())
        assert len(set(self._ranges)) == len(self._ranges)
        assert self._draining <= set(self._ranges)

    def _drop(self, session: Session) -> None:
        del self._sessions[session.id]
        if self._parked.pop(session.id, None) is None:
            self._reserved -= session.max_tokens


def _check_names(previous: PeerId | None, onward: PeerId | None, addresses: Sequence[str]) -> None:
    if onward is not None and onward == previous:
        raise BadFrame("a route does not lead back to where it comes from")
    peers = [peer for peer in (previous, onward) if peer is not None]
    if len(addresses) > MAX_ADDRESSES or any(len(text) > MAX_TEXT for text in (*peers, *addresses)):
        raise BadFrame(f"more than {MAX_ADDRESSES} addresses, or one or a peer of more than {MAX_TEXT} letters")
