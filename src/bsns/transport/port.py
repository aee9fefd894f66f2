"""What a transport is: authenticated, ordered streams of frames between peers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.protocol.frames import MAX_BODY_BYTES, Buffer, Message

MAX_UNSENT_BYTES = 4 * MAX_BODY_BYTES

Dial = Callable[[PeerId, Sequence[str]], Awaitable["Stream"]]
"""Opens a stream to a peer and greets it; raises PeerError or ProtocolError within a deadline of its own."""
Take = Callable[[Message, list[memoryview]], None]


class Sent(NamedTuple):
    """Bytes: those given to a stream, and those of them that its other end's host has taken, as far as this one can
    tell. So whoever waits for an answer over a slow way sees that it is on its way."""

    given: int
    taken: int


class Stream(Protocol):
    """One ordered, full-duplex stream of frames to a peer whose id the transport has proven."""

    @property
    def peer(self) -> PeerId: ...

    async def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Queue one frame; returns once the transport accepts more (back-pressure).

        Buffers must not change until then. Raises PeerLost when the stream is closed, FrameTooLarge for an oversized
        frame of our own.
        """
        ...

    def post(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Queue one frame without waiting, for conversations that bound by themselves how much lies unsent.

        A peer that lets more than MAX_UNSENT_BYTES pile up is cut off. Raises PeerLost, FrameTooLarge.
        """
        ...

    def sent(self) -> Sent:
        """How much this stream was given so far, and how much of it has gone."""
        ...

    async def receive(self, max_body_bytes: int | None = None) -> tuple[Message, list[memoryview]]:
        """The next frame, whose views the caller owns. `max_body_bytes` tightens the protocol's limits.

        Raises PeerLost at the end of the stream and a ProtocolError for anything that is not a valid frame; after
        either the stream is of no more use.
        """
        ...

    async def each(self, take: Take) -> NoReturn:
        """Call `take` with every frame from now on. Ends by raising what `receive` raises, or what `take` raised."""
        ...

    async def close(self) -> None:
        """Close both directions; idempotent and never raises."""
        ...


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """This peer's place in the network."""

    @property
    def peer(self) -> PeerId: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses, with the peer id, under which others can reach this peer; empty if it does not listen."""
        ...

    async def dial(self, peer: PeerId, addresses: Sequence[str] = (), *, deadline_s: float = 5.0) -> Stream:
        """Open a stream to a peer. Raises PeerUnreachable, at the latest after `deadline_s`."""
        ...

    async def listen(self, handler: Handler) -> None:
        """Call `handler` in a task of its own for each stream others open; the stream closes when it returns."""
        ...

    async def lost(self) -> BsnsError:
        """Wait until this peer is cut off from the network by a fault of its own machine; the error that says how."""
        ...

    async def close(self) -> None:
        """Close every stream and stop listening; idempotent."""
        ...
