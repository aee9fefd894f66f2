"""Direct streams: sealed TCP between peers that were introduced, closed to everybody else."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import pytest_asyncio

from bsns.core.errors import BadFrame, BsnsError, FrameTooLarge, PeerLost, PeerUnreachable
from bsns.core.ids import PeerId
from bsns.protocol.frames import MAX_BODY_BYTES, Message
from bsns.protocol.greeting import DirectOffer, Refusal
from bsns.protocol.inference import Part, Ping, Pong, Step
from bsns.protocol.tensors import TensorSpec
from bsns.transport.direct import MAX_STREAMS_PER_PEER, DirectListener, DirectStream, connect, hosts_of

THERE = PeerId("there")
HERE = PeerId("here")


class Place:
    """A listener that keeps the streams it was handed."""

    def __init__(self) -> None:
        self.listener = DirectListener()
        self.streams: asyncio.Queue[DirectStream] = asyncio.Queue()

    async def start(self) -> None:
        await self.listener.start("127.0.0.1", ["127.0.0.1"], self._take)

    async def _take(self, stream: object) -> None:
        assert isinstance(stream, DirectStream)
        await self.streams.put(stream)
        await asyncio.Event().wait()

    def offer(self) -> DirectOffer:
        offer = self.listener.offer(HERE)
        assert offer is not None
        return offer

    async def pair(self) -> tuple[DirectStream, DirectStream]:
        """Both ends of a fresh stream, the dialler's first."""
        near = await connect(THERE, self.offer())
        async with asyncio.timeout(5):
            return near, await self.streams.get()


@pytest_asyncio.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    monkeypatch.setattr("bsns.transport.direct.CONNECT_S", 30.0)  # none of these is about it
    made = Place()
    await made.start()
    yield made
    await made.listener.close()


async def hear(stream: DirectStream) -> tuple[Message, list[memoryview]]:
    async with asyncio.timeout(5):
        return await stream.receive()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110  a listener has no event for this
            await asyncio.sleep(0.01)


def step(rows: int) -> tuple[Step, bytes]:
    body = bytes(range(256)) * (rows * 8)
    return Step((Part(7, 0, rows, 1),), (TensorSpec.raw("hidden", "float32", (rows, 512)),)), body  # type: ignore[arg-type]


async def test_frames_pass_both_ways_and_keep_their_order(place: Place) -> None:
    near, far = await place.pair()
    assert (near.peer, far.peer) == (THERE, HERE)
    message, body = step(3)
    near.post(Ping(1))
    await near.send(message, [body])
    assert (await hear(far))[0] == Ping(1)
    heard, views = await hear(far)
    assert heard == message
    assert bytes(views[0]) == body
    await far.send(Pong(1))
    assert (await hear(near))[0] == Pong(1)


async def test_a_large_frame_passes_whole(place: Place) -> None:
    near, far = await place.pair()
    message, body = step(8192)
    sending = asyncio.create_task(near.send(message, [body]))
    _, views = await hear(far)
    await sending
    assert bytes(views[0]) == body


async def test_each_hands_frames_on_until_the_stream_ends(place: Place) -> None:
    near, far = await place.pair()
    heard: list[Message] = []
    near.post(Ping(1))
    reading = asyncio.create_task(far.each(lambda message, _: heard.append(message)))
    near.post(Ping(2))
    await near.close()
    with pytest.raises(PeerLost):
        await asyncio.wait_for(reading, 5)
    assert heard == [Ping(1), Ping(2)]


async def test_what_take_raises_ends_each_and_can_still_be_answered(place: Place) -> None:
    near, far = await place.pair()

    def refuse(message: Message, _: list[memoryview]) -> None:
        raise BadFrame("not here")

    reading = asyncio.create_task(far.each(refuse))
    near.post(Ping(1))
    with pytest.raises(BadFrame, match="not here"):
        await asyncio.wait_for(reading, 5)
    far.post(Refusal("BadFrame", "not here"))
    assert (await hear(near))[0] == Refusal("BadFrame", "not here")


@pytest.mark.parametrize("spoil", ["token", "reused", "late"])
async def test_strangers_get_nothing(place: Place, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = place.offer()
    if spoil == "token":
        offer = msgspec.structs.replace(offer, token=bytes(16))
    elif spoil == "reused":
        await connect(THERE, offer)
        await asyncio.wait_for(place.streams.get(), 5)
    else:
        monkeypatch.setattr("bsns.transport.direct.time.monotonic", lambda: 1e12)
    with pytest.raises(PeerUnreachable):
        await connect(THERE, offer)
    assert place.streams.empty()


async def test_the_token_without_the_key_is_not_enough(place: Place) -> None:
    with pytest.raises(PeerUnreachable):  # what the listener says first does not open
        await connect(THERE, msgspec.structs.replace(place.offer(), key=bytes(32)))
    stolen = await asyncio.wait_for(place.streams.get(), 5)
    with pytest.raises(PeerLost):
        await hear(stolen)


async def test_somebody_else_at_the_peers_address_is_not_taken_for_it() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n" + bytes(64))

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerUnreachable):
            await connect(THERE, DirectOffer(("127.0.0.1",), port, bytes(16), bytes(32)))


async def test_tampered_and_replayed_frames_are_refused(place: Place) -> None:
    offer = place.offer()
    recorded = bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", offer.port)
    stream = DirectStream(THERE, offer.key, dialled=True)

    class Recorder(asyncio.Transport):
        def write(self, data: bytes) -> None:  # type: ignore[override]
            recorded.extend(data)

        def is_closing(self) -> bool:
            return False

        def get_write_buffer_size(self) -> int:
            return 0

        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
            return None

    stream.start(Recorder())
    stream.post(Ping(1))
    writer.write(offer.token + bytes(recorded) * 2)  # the second copy has the right key but a used nonce
    far = await asyncio.wait_for(place.streams.get(), 5)
    assert (await hear(far))[0] == Ping(1)
    with pytest.raises(BadFrame, match="seal"):
        await hear(far)
    writer.close()
    assert len(await reader.read()) > 0  # the listener's greeting, and nothing that answers the second copy


async def test_a_huge_length_is_refused_before_anything_is_gathered(place: Place) -> None:
    offer = place.offer()
    _, writer = await asyncio.open_connection("127.0.0.1", offer.port)
    writer.write(offer.token + struct.pack("<I", 2 * MAX_BODY_BYTES))
    far = await asyncio.wait_for(place.streams.get(), 5)
    with pytest.raises(FrameTooLarge):
        await hear(far)
    writer.close()


async def test_both_ends_notice_a_host_that_vanishes(place: Place) -> None:
    for stream in await place.pair():
        assert stream._transport is not None
        raw = stream._transport.get_extra_info("socket")
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10


async def test_an_offer_nobody_serves_is_unreachable() -> None:
    with pytest.raises(PeerUnreachable):
        await connect(THERE, DirectOffer(("127.0.0.1",), 1, bytes(16), bytes(32)))
    with pytest.raises(PeerUnreachable):
        await connect(THERE, DirectOffer(("127.0.0.1",), 1, b"short", bytes(32)))


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70_000), ("127.0.0.1", -1), ("127.0.0.1", 2**63), ("a" * 99, 1), ("x\0y", 1)]
)
async def test_an_offer_of_no_possible_place_is_unreachable(host: str, port: int) -> None:
    with pytest.raises(PeerUnreachable):
        await connect(THERE, DirectOffer((host,), port, bytes(16), bytes(32)))


async def test_one_peer_holds_a_few_direct_streams_only(place: Place) -> None:
    for _ in range(MAX_STREAMS_PER_PEER):
        await place.pair()
    with pytest.raises(PeerUnreachable):
        await connect(THERE, place.offer())
    offer = place.listener.offer(PeerId("somebody else"))
    assert offer is not None
    await connect(THERE, offer)


async def test_sending_on_a_closed_stream_says_so(place: Place) -> None:
    near, far = await place.pair()
    await far.close()
    with pytest.raises(PeerLost):
        await hear(near)
    with pytest.raises(BsnsError):
        near.post(Ping(1))


def test_hosts_are_read_from_multiaddresses() -> None:
    addresses = ["/ip4/10.0.0.1/tcp/4001/p2p/x", "/ip4/10.0.0.1/udp/4001/quic-v1/p2p/x", "/dns4/a.example/tcp/1"]
    assert hosts_of(addresses) == ("10.0.0.1", "a.example")
    assert hosts_of(["/p2p/x", ""]) == ()
    assert hosts_of(["/ip4/127.0.0.1/tcp/1"]) == ("127.0.0.1",)
    assert hosts_of(["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1"]) == ("10.0.0.1",)


async def test_strangers_who_say_nothing_are_few(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = place.offer()
    monkeypatch.setattr("bsns.transport.direct.MAX_OFFERS", 1)
    _, silent = await asyncio.open_connection("127.0.0.1", offer.port)
    await until(lambda: bool(place.listener.knocking))
    reader, turned_away = await asyncio.open_connection("127.0.0.1", offer.port)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    silent.close()
    await until(lambda: not place.listener.knocking)
    turned_away.close()
    await connect(THERE, offer)
