"""Peers of one process joined by byte queues: the transport of tests and of the simulator.

Every frame is really encoded and decoded, so the protocol's limits hold here as they do on a network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NoReturn

from bsns.core.errors import BsnsError, PeerLost, PeerUnreachable
from bsns.core.ids import PeerId
from bsns.protocol.frames import Buffer, Message, encode
from bsns.transport.framing import FrameReader
from bsns.transport.port import Handler, Sent, Take

log = logging.getLogger(__name__)

PIPE_BYTES = 512 * 1024
"""A sender waits while about twice this much lies unread."""


class _Gate(asyncio.ReadTransport):
    """Stands where a StreamReader expects its socket, and turns its back-pressure into an event."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()

    def pause_reading(self) -> None:
        self.open.clear()

    def resume_reading(self) -> None:
        self.open.set()


class Pipe:
    """One direction of a stream: bytes in at one end, frames out at the other."""

    def __init__(self, sender: PeerId, receiver: PeerId, network: MemoryNetwork) -> None:
        self.sender, self.receiver = sender, receiver
        self.ends = frozenset((sender, receiver))
        self._network = network
        self._held = bytearray()
        self._held_end: bool | None = None
        self._reader = asyncio.StreamReader(limit=PIPE_BYTES)
        self._gate = _Gate()
        self._reader.set_transport(self._gate)
        self.frames = FrameReader(self._reader, sender)
        self.given = 0
        """Bytes so far."""
        self.closed = self.ended = False
        """Whether its sender may send no more, and whether its receiver knows that."""

    def feed(self, data: bytes) -> None:
        """Send."""
        self.given += len(data)
        self._network.carry(self, data)

    def sent(self) -> Sent:
        """See transport.port.Stream."""
        return Sent(self.given, self.given - self._network.underway(self))

    def arrive(self, data: bytes) -> None:
        """Take what has come over the network; what comes while the peers are silent is held back."""
        if self._network.is_silent(self.ends):
            self._held += data
            self._network.hold(self)
        elif data and not self.ended:
            self._reader.feed_data(data)

    def resume(self) -> None:
        """Bring what was held back while the peers were silent."""
        held, self._held = bytes(self._held), bytearray()
        self.arrive(held)
        if self._held_end is not None:
            self.end(self._held_end)

    async def drained(self) -> None:
        await self._gate.open.wait()

    def close(self, *, lost: bool = False) -> None:
        """Take nothing more, and tell the receiver."""
        if not self.closed:
            self.closed = True
            self._network.carry_end(self, lost)

    def end(self, lost: bool) -> None:
        """The receiver learns that the stream has ended."""
        if self.ended:
            return
        if self._network.is_silent(self.ends):
            self._held_end = lost
            self._network.hold(self)
            return
        self.ended = True
        if lost:
            self._reader.set_exception(ConnectionResetError())
        else:
            self._reader.feed_eof()
        self._gate.open.set()


class MemoryStream:
    """One end of a stream between two peers of a MemoryNetwork (transport.port.Stream)."""

    def __init__(self, owner: MemoryTransport, peer: PeerId, inbound: Pipe, outbound: Pipe) -> None:
        self._owner = owner  # keeps the network, and so the peer's handler, alive as long as a stream is held
        self._peer = peer
        self._inbound = inbound
        self._outbound = outbound

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Raises PeerLost or FrameTooLarge; waits while the peer has about 1 MiB unread."""
        self.post(message, buffers)
        await self._outbound.drained()

    def post(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Raises PeerLost or FrameTooLarge."""
        self._feed(b"".join(encode(message, buffers)))

    def sent(self) -> Sent:
        """See transport.port.Stream."""
        return self._outbound.sent()

    async def send_bytes(self, data: bytes) -> None:
        """Raw bytes in place of a frame: how tests play a hostile peer. Raises PeerLost."""
        self._feed(data)
        await self._outbound.drained()

    def _feed(self, data: bytes) -> None:
        if self._outbound.closed:
            raise PeerLost(f"the stream to {self._peer} is closed")
        self._outbound.feed(data)

    async def receive(self, max_body_bytes: int | None = None) -> tuple[Message, list[memoryview]]:
        """Raises PeerLost or a ProtocolError."""
        return await self._inbound.frames.receive(max_body_bytes)

    async def each(self, take: Take) -> NoReturn:
        """See transport.port.Stream."""
        while True:
            take(*await self.receive())

    async def close(self) -> None:
        """The peer still reads what was sent before, then finds the stream ended."""
        self._outbound.close()
        self._inbound.close(lost=True)

    @property
    def closed(self) -> bool:
        return self._outbound.closed and self._inbound.closed

    def cut(self) -> None:
        """End both directions at once, losing what is under way."""
        self._outbound.close(lost=True)
        self._inbound.close(lost=True)


class MemoryTransport:
    """One peer of a MemoryNetwork (transport.port.Transport)."""

    def __init__(self, network: MemoryNetwork, peer: PeerId) -> None:
        self._network = network
        self._peer = peer
        self.handler: Handler | None = None
        self.streams: list[MemoryStream] = []
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order, so that they end in order

    @property
    def peer(self) -> PeerId:
        return self._peer

    @property
    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/p2p/{self._peer}",)

    async def dial(self, peer: PeerId, addresses: Sequence[str] = (), *, deadline_s: float = 5.0) -> MemoryStream:
        """Raises PeerUnreachable unless the peer is alive, connected with this one, and listens."""
        await self._network.dialled(self._peer, peer)
        if peer == self._peer:
            raise PeerUnreachable("a peer does not dial itself")  # nor does one of libp2p
        while self._network.is_silent(frozenset((self._peer, peer))):
            if deadline_s <= 0:
                raise PeerUnreachable(f"{peer} does not answer")
            await asyncio.sleep(min(0.05, deadline_s))
            deadline_s -= 0.05
        there = self._network.reach(self._peer, peer)
        if there is None or there.handler is None:
            raise PeerUnreachable(f"{peer} does not answer")
        forth, back = Pipe(self._peer, peer, self._network), Pipe(peer, self._peer, self._network)
        near = MemoryStream(self, peer, inbound=back, outbound=forth)
        self._keep(near)
        there.accept(MemoryStream(there, self._peer, inbound=forth, outbound=back), there.handler)
        return near

    def accept(self, stream: MemoryStream, handler: Handler) -> None:
        async def serve() -> None:
            try:
                await handler(stream)
            except BsnsError as error:
                log.debug("the stream from %s ended: %s", stream.peer, error)
            except Exception:
                log.exception("the handler of a stream from %s failed", stream.peer)
            finally:
                await stream.close()

        self._keep(stream)
        task = asyncio.create_task(serve())
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def _keep(self, stream: MemoryStream) -> None:
        self.streams = [known for known in self.streams if not known.closed]
        self.streams.append(stream)

    async def listen(self, handler: Handler) -> None:
        self.handler = handler

    async def lost(self) -> BsnsError:
        never: asyncio.Future[BsnsError] = asyncio.get_running_loop().create_future()  # it has no machine of its own
        return await never

    async def close(self) -> None:
        self._network.forget(self._peer)
        self.handler = None
        for stream in self.streams:
            await stream.close()
        self.streams.clear()
        await self._stop_handlers()

    async def _stop_handlers(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def die(self) -> None:
        """Vanish as a killed process does: no goodbye, streams cut, handlers stopped."""
        self.handler = None
        for stream in self.streams:
            stream.cut()
        for task in list(self._tasks):
            task.cancel()


class MemoryNetwork:
    """All the peers that can reach each other; cuts and kills are made here."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, MemoryTransport] = {}
        self._cut: set[frozenset[PeerId]] = set()
        self._silent: set[frozenset[PeerId]] = set()
        self._frozen: set[PeerId] = set()
        self._holding: dict[Pipe, None] = {}

    def carry(self, pipe: Pipe, data: bytes) -> None:
        """Bring bytes to the other end of a pipe: here at once."""
        pipe.arrive(data)

    def underway(self, pipe: Pipe) -> int:
        """How many of a pipe's bytes have not been taken yet."""
        return 0

    def carry_end(self, pipe: Pipe, lost: bool) -> None:
        """Bring the news that a pipe has ended, after all that was sent before."""
        pipe.end(lost)

    async def dialled(self, source: PeerId, target: PeerId) -> None:
        """Wait as long as it takes to learn whether `target` is there."""
        await asyncio.sleep(0)

    def transport(self, peer: PeerId | str) -> MemoryTransport:
        """A new peer of the given id."""
        transport = MemoryTransport(self, PeerId(peer))
        self._peers[transport.peer] = transport
        return transport

    def reach(self, source: PeerId, target: PeerId) -> MemoryTransport | None:
        """The transport `source` finds when it dials `target`; None if dead, unknown or cut off."""
        return None if frozenset((source, target)) in self._cut else self._peers.get(target)

    def forget(self, peer: PeerId) -> None:
        self._peers.pop(peer, None)

    def kill(self, peer: PeerId) -> None:
        """Kill a peer: whoever shares a stream with it sees PeerLost, whoever dials it PeerUnreachable."""
        transport = self._peers.pop(peer, None)
        if transport is not None:
            transport.die()

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Part two peers: their streams are lost and new ones are refused until `heal`."""
        self._cut.add(frozenset((one, other)))
        for near, far in ((one, other), (other, one)):
            transport = self._peers.get(near)
            for stream in transport.streams if transport is not None else ():
                if stream.peer == far:
                    stream.cut()

    def silence(self, one: PeerId, other: PeerId) -> None:
        """Let nothing come from either to the other, as where packets are dropped: no stream ends. `sound` ends it."""
        self._silent.add(frozenset((one, other)))

    def freeze(self, peer: PeerId) -> None:
        """Silence a peer to everybody, as a stopped process is. `sound` ends it."""
        self._frozen.add(peer)

    def sound(self, peer: PeerId) -> None:
        """End every silence of a peer; what was held back comes."""
        self._silent = {ends for ends in self._silent if peer not in ends}
        self._frozen.discard(peer)
        self.resume()

    def hold(self, pipe: Pipe) -> None:
        """A pipe has something that its ends, being silent, do not hear of yet."""
        self._holding[pipe] = None

    def resume(self) -> None:
        """Bring what was held back between peers that are silent no more."""
        holding, self._holding = self._holding, {}
        for pipe in holding:
            pipe.resume()

    def is_silent(self, ends: frozenset[PeerId]) -> bool:
        return ends in self._silent or not self._frozen.isdisjoint(ends)

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Undo `cut` for streams opened from now on."""
        self._cut.discard(frozenset((one, other)))
