"""Links: one stream to each node a client talks to, and who is waiting for what on it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import structlog

from bsns.core.errors import BadFrame, BsnsError, PeerFailed, PeerLost, PeerTimedOut, ProtocolError, error_from_wire
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.frames import Buffer, Message
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import (
    Close,
    Closed,
    Describe,
    Description,
    Failure,
    Mirror,
    Mirrored,
    Open,
    Opened,
    Part,
    Ping,
    Pong,
    Reroute,
    Rerouted,
    Resize,
    Resized,
    Result,
    There,
    Where,
)
from bsns.protocol.probing import Probe, Probed
from bsns.protocol.tensors import TensorSpec
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.port import Dial, Sent, Stream

log = structlog.get_logger(__name__)

MOST_UNDERWAY_S = 20.0
"""A question that has not arrived after so long is given up."""
STANDSTILL_S = 0.1
"""A deadline that passes so late has not passed for want of an answer: it is given once more."""
TURNS = 5
"""Of the event loop, that an answer takes from its socket to whoever waits for it."""

K = TypeVar("K")
T = TypeVar("T")

OnResults = Callable[[PeerId, str, list[tuple[Part, memoryview]]], None]
"""Takes a frame's results: their codec, and for each part its rows' bytes."""
OnFailure = Callable[[PeerId, SessionId, BsnsError], None]
"""Takes who tells, of which session, what; the error says who is to blame."""
OnLost = Callable[[PeerId, BsnsError], None]


class Link:
    """One stream to one node, with a task that reads it."""

    def __init__(
        self,
        stream: Stream,
        on_results: OnResults,
        on_failure: OnFailure,
        on_lost: OnLost,
        clock: Clock = MACHINE_CLOCK,
    ) -> None:
        self.peer = stream.peer
        self._clock = clock
        self._stream = stream
        self._on_results = on_results
        self._on_failure = on_failure
        self._on_lost = on_lost
        self._opening: dict[SessionId, asyncio.Future[int]] = {}
        self._closing: dict[SessionId, asyncio.Future[int]] = {}
        self._rerouting: dict[SessionId, asyncio.Future[None]] = {}
        self._resizing: dict[SessionId, asyncio.Future[None]] = {}
        self._mirroring: dict[tuple[SessionId, PeerId | None], asyncio.Future[None]] = {}
        self._wheres: dict[SessionId, list[asyncio.Future[There]]] = {}
        """Answered in their order, whoever asks, and whether that is still waited for."""
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._probes: dict[int, asyncio.Future[float]] = {}
        self._descriptions: list[asyncio.Future[Description]] = []
        self._nonces = itertools.count()
        self.lost: BsnsError | None = None
        # in nobody's context: it serves other answers than the one that needs it first
        self._reader = asyncio.create_task(self._read(), context=contextvars.Context())

    async def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Raises PeerLost."""
        await self._stream.send(message, buffers)

    def post(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Send without waiting, for steps, of which a session has few unanswered. Raises PeerLost."""
        self._stream.post(message, buffers)

    async def open(self, message: Open, deadline_s: float) -> int:
        """Open a session; how many tokens of cache the node has left. Raises what the node answers, or PeerTimedOut."""
        return await self._ask(self._opening, message.session, message, deadline_s)

    async def close_session(self, session: SessionId, deadline_s: float) -> int:
        """Close a session; how many tokens of cache the node has left. Raises PeerTimedOut, PeerLost."""
        return await self._ask(self._closing, session, Close(session), deadline_s)

    async def reroute(self, message: Reroute, deadline_s: float) -> None:
        """Give a session other neighbours on this node. Raises what the node answers, PeerTimedOut, PeerLost."""
        await self._ask(self._rerouting, message.session, message, deadline_s)

    async def mirror(self, message: Mirror, deadline_s: float) -> None:
        """Let a spare get what the next stage gets. Raises what the node answers, PeerTimedOut, PeerLost."""
        await self._ask(self._mirroring, (message.session, message.peer), message, deadline_s)

    async def resize(self, message: Resize, deadline_s: float) -> None:
        """Reserve another size for a session. Raises what the node answers, PeerTimedOut, PeerLost."""
        await self._ask(self._resizing, message.session, message, deadline_s)

    async def where(self, session: SessionId, deadline_s: float) -> There:
        """How far a session has come on the node. Raises PeerTimedOut, PeerLost."""
        future: asyncio.Future[There] = asyncio.get_running_loop().create_future()
        self._wheres.setdefault(session, []).append(future)
        return await self._wait(future, Where(session), deadline_s)

    async def ping(self, deadline_s: float = 2.0) -> float:
        """Round-trip time in seconds. Raises PeerTimedOut, PeerLost."""
        nonce = next(self._nonces)
        started_s = self._clock.now_s()
        await self._ask(self._pings, nonce, Ping(nonce), deadline_s)
        return self._clock.now_s() - started_s

    async def probe(self, body: memoryview, deadline_s: float = 5.0) -> float:
        """Seconds until the node has said that these bytes (a multiple of 8) have come.

        Raises PeerFailed if it takes no more probes for now, PeerTimedOut, PeerLost.
        """
        nonce = next(self._nonces)
        message = Probe(nonce, (TensorSpec.raw("probe", "int64", (body.nbytes // 8,)),))
        started_s = self._clock.now_s()
        wait_s = await self._ask(self._probes, nonce, message, deadline_s, (body,))
        if wait_s > 0:
            raise PeerFailed(f"node {self.peer} takes no more probes for {wait_s:.1f} s")
        return self._clock.now_s() - started_s

    async def describe(self, deadline_s: float = 2.0) -> Description:
        """The node's present numbers. Raises PeerTimedOut, PeerLost."""
        future: asyncio.Future[Description] = asyncio.get_running_loop().create_future()
        self._descriptions.append(future)
        return await self._wait(future, Describe(), deadline_s)

    def sent(self) -> Sent:
        """How much the node was sent so far, and how much of it is on its way no more."""
        return self._stream.sent()

    async def give_up(self, error: BsnsError) -> None:
        """Take the node for lost, though its stream is open, and end the stream."""
        self._reader.cancel()
        if self.lost is None:
            self._lose(error)
        await self.close()

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._stream.close()

    async def _ask(
        self,
        waiting: dict[K, asyncio.Future[T]],
        key: K,
        message: Message,
        deadline_s: float,
        buffers: Sequence[Buffer] = (),
    ) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiting[key] = future
        try:
            return await self._wait(future, message, deadline_s, buffers)
        finally:
            if waiting.get(key) is future:
                del waiting[key]

    async def _wait(
        self, future: asyncio.Future[T], message: Message, deadline_s: float, buffers: Sequence[Buffer] = ()
    ) -> T:
        """What a question's future brings. Its time has not begun while the question itself is still on its way: a slow
        one, behind a long prompt say."""
        try:
            if self.lost is not None:
                raise self.lost
            ahead = self._stream.sent()
            self._stream.post(message, buffers)
            end = self._stream.sent().given if ahead.taken < ahead.given else 0
            give_up_s = self._clock.now_s() + MOST_UNDERWAY_S
            again = False
            while True:
                before = self._stream.sent().taken
                due_s = self._clock.now_s() + deadline_s
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(deadline_s):
                        return await asyncio.shield(future)
                for _ in range(TURNS):  # we may have stood still ourselves, and its answer be there
                    if future.done():
                        return future.result()
                    await asyncio.sleep(0)
                moves = before < end and self._stream.sent().taken > before
                now_s = self._clock.now_s()
                stood_still = not again and now_s - due_s > STANDSTILL_S  # this process, if not the whole machine
                again = again or stood_still
                if not (moves or stood_still) or now_s > give_up_s:
                    break
        finally:
            future.cancel()  # what comes later is for nobody
        raise PeerTimedOut(f"node {self.peer} did not answer {type(message).__name__} within {deadline_s:g} s")

    async def _read(self) -> None:
        try:
            await self._stream.each(self._take)
        except BsnsError as error:
            self._lose(error)
        except Exception as error:
            log.exception("reading a link failed", peer=self.peer)
            self._lose(PeerLost(f"reading from node {self.peer} failed: {type(error).__name__}"))
        finally:  # here, where whoever gives the node up may be cancelled: its end frees our sessions there
            await self._stream.close()

    def _take(self, message: Message, buffers: list[memoryview]) -> None:
        match message:
            case Result():
                parts = split_rows(message, buffers)
                self._on_results(self.peer, message.tensors[0].codec, parts)
            case Failure():
                error = error_from_wire(message.code, message.message, message.about)
                opening = self._opening.get(message.session)
                if opening is not None:
                    _fail(opening, error)
                else:
                    self._on_failure(self.peer, message.session, error.about(self.peer))
            case Opened():
                _settle(self._opening.get(message.session), message.cache_tokens_left)
            case Rerouted():
                self._settle_or_fail(self._rerouting.get(message.session), message)
            case Resized():
                self._settle_or_fail(self._resizing.get(message.session), message)
            case Mirrored():
                self._settle_or_fail(self._mirroring.get((message.session, message.peer)), message)
            case Closed():
                _settle(self._closing.get(message.session), message.cache_tokens_left)
            case There():
                asked = self._wheres.get(message.session, [])
                if asked:
                    _settle(asked.pop(0), message)
                if not asked:
                    self._wheres.pop(message.session, None)
            case Pong():
                _settle(self._pings.get(message.nonce), None)
            case Probed():
                _settle(self._probes.get(message.nonce), message.wait_s)
            case Description():
                if self._descriptions:
                    _settle(self._descriptions.pop(0), message)
            case Refusal():
                raise error_from_wire(message.code, message.message)
            case _:
                raise BadFrame(f"a client does not take {type(message).__name__}")

    def _settle_or_fail(self, future: asyncio.Future[None] | None, message: Rerouted | Mirrored | Resized) -> None:
        if not message.code:
            _settle(future, None)
        elif future is not None:
            _fail(future, error_from_wire(message.code, message.message, message.about).about(self.peer))

    def _lose(self, error: BsnsError) -> None:
        if isinstance(error, ProtocolError):
            error = PeerLost(f"node {self.peer} broke the protocol: {error.message}")
        self.lost = error
        waiting: list[asyncio.Future[Any]] = [
            *self._opening.values(),
            *self._closing.values(),
            *self._rerouting.values(),
            *self._resizing.values(),
            *self._mirroring.values(),
            *(future for asked in self._wheres.values() for future in asked),
            *self._pings.values(),
            *self._probes.values(),
            *self._descriptions,
        ]
        for future in waiting:
            _fail(future, error)
        self._on_lost(self.peer, error)


def split_rows(message: Result, buffers: Sequence[memoryview]) -> list[tuple[Part, memoryview]]:
    """Each part of a result with its rows' bytes. Raises BadFrame if the tensor does not have the parts' rows."""
    if len(message.tensors) != 1 or any(part.wanted < 0 for part in message.parts):
        raise BadFrame("a result carries one tensor 'hidden'")
    rows = sum(part.wanted for part in message.parts)
    shape = message.tensors[0].shape
    if len(shape) != 2 or shape[0] != rows:
        raise BadFrame(f"a result of {rows} rows came with a tensor of shape {shape}")
    row_bytes = buffers[0].nbytes // rows if rows else 0
    pieces: list[tuple[Part, memoryview]] = []
    offset = 0
    for part in message.parts:
        end = offset + part.wanted * row_bytes
        pieces.append((part, buffers[0][offset:end]))
        offset = end
    return pieces


class Links:
    """A client's links, opened when first needed. A lost link is forgotten, so that the next use dials anew."""

    def __init__(
        self, dial: Dial, on_results: OnResults, on_failure: OnFailure, on_lost: OnLost, clock: Clock = MACHINE_CLOCK
    ) -> None:
        self._dial = dial
        self._clock = clock
        self._on_results = on_results
        self._on_failure = on_failure
        self._on_lost = on_lost
        self._links: dict[PeerId, Link] = {}
        self._locks: dict[PeerId, asyncio.Lock] = {}
        self._closed = False

    async def to(self, peer: PeerId, addresses: Sequence[str] = ()) -> Link:
        """The link to a peer. Raises PeerError or ProtocolError if none can be had, PeerLost after `close`."""
        async with self._locks.setdefault(peer, asyncio.Lock()):
            self._check_open()
            link = self._links.get(peer)
            if link is None or link.lost is not None:
                stream = await self._dial(peer, addresses)
                try:
                    self._check_open()
                except PeerLost:
                    await stream.close()
                    raise
                link = self._links[peer] = Link(stream, self._on_results, self._on_failure, self._on_lost, self._clock)
            return link

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost("the client was closed")

    def others(self, peers: Collection[PeerId]) -> list[Link]:
        """The links there are to anybody but these."""
        return [link for peer, link in self._links.items() if peer not in peers and link.lost is None]

    async def drop(self, peer: PeerId) -> None:
        """Close the link to a peer, if there is one."""
        link = self._links.pop(peer, None)
        self._locks.pop(peer, None)
        if link is not None:
            await link.close()

    def shut(self) -> None:
        """Let nobody be dialled any more."""
        self._closed = True

    async def close(self) -> None:
        """End every link; no new one is made."""
        self.shut()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))


def _settle(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[T], error: BsnsError) -> None:
    if not future.done():
        future.set_exception(error)
