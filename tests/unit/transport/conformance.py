"""What every transport must do; each transport's tests inherit this suite and provide two or more connected peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from running_time import running_s

from bsns.core.errors import BadFrame, BadTensor, FrameTooLarge, PeerLost, PeerUnreachable, ProtocolError
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.frames import MAX_BODY_BYTES, MAX_HEADER_BYTES, PREFIX, encode
from bsns.protocol.inference import Part, Ping, Pong, Step
from bsns.protocol.tensors import TensorSpec
from bsns.transport.port import Stream, Transport

DEADLINE_S = 20.0


def step_of(values: int) -> Step:
    return Step((Part(SessionId(1), 0, 1, 0),), (TensorSpec.raw("hidden", "float32", (1, values)),))


async def echo(stream: Stream) -> None:
    """Answer Pings with Pongs and Steps with themselves, until the peer goes."""
    while True:
        message, buffers = await stream.receive()
        await stream.send(Pong(message.nonce) if isinstance(message, Ping) else message, buffers)


class TransportConformance:
    """`make_peer` starts a peer that may dial all peers made before it; `kill` ends one without a goodbye."""

    make_peer: Callable[[], Awaitable[Transport]]

    @pytest.fixture
    async def pair(self) -> AsyncIterator[tuple[Transport, Transport]]:
        """A listening echo server and a dialler."""
        async with asyncio.timeout(DEADLINE_S):
            server = await self.make_peer()
            await server.listen(echo)
            client = await self.make_peer()
        yield server, client
        async with asyncio.timeout(DEADLINE_S):
            await client.close()
            await server.close()

    async def open(self, pair: tuple[Transport, Transport]) -> Stream:
        server, client = pair
        return await client.dial(server.peer, server.addresses)

    async def test_frames_come_back_in_order(self, pair: tuple[Transport, Transport]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            for nonce in range(20):
                await stream.send(Ping(nonce))
            assert [(await stream.receive())[0] for _ in range(20)] == [Pong(nonce) for nonce in range(20)]

    async def test_each_side_knows_the_others_proven_id(self, pair: tuple[Transport, Transport]) -> None:
        _server, client = pair
        seen: asyncio.Queue[PeerId] = asyncio.Queue()

        async def note(stream: Stream) -> None:
            await seen.put(stream.peer)

        async with asyncio.timeout(DEADLINE_S):
            third = await self.make_peer()
            try:
                await third.listen(note)
                stream = await client.dial(third.peer, third.addresses)
                assert stream.peer == third.peer
                assert await seen.get() == client.peer
            finally:
                await third.close()

    async def test_tensors_arrive_whole_writable_and_unshared(self, pair: tuple[Transport, Transport]) -> None:
        payload = bytes(range(256)) * 64
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            await stream.send(step_of(len(payload) // 4), [memoryview(payload)])
            message, (view,) = await stream.receive()
        assert message == step_of(len(payload) // 4)
        assert view == payload
        view[0] = 1

    async def test_the_largest_frame_passes(self, pair: tuple[Transport, Transport]) -> None:
        payload = bytearray(MAX_BODY_BYTES)
        payload[-1] = 7
        async with asyncio.timeout(60):
            stream = await self.open(pair)
            sending = asyncio.create_task(stream.send(step_of(len(payload) // 4), [payload]))
            _, (view,) = await stream.receive()
            await sending
        assert len(view) == len(payload)
        assert view[-1] == 7

    async def test_our_own_oversized_frame_is_not_sent(self, pair: tuple[Transport, Transport]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            with pytest.raises(FrameTooLarge):
                await stream.send(step_of(1), [bytes(MAX_BODY_BYTES + 1)])
            await stream.send(Ping(1))
            assert (await stream.receive())[0] == Pong(1)

    async def test_a_cancelled_receive_loses_nothing(self, pair: tuple[Transport, Transport]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            waiting = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await stream.send(Ping(5))
            assert (await stream.receive())[0] == Pong(5)

    async def test_many_streams_at_once(self, pair: tuple[Transport, Transport]) -> None:
        async def visit(nonce: int) -> None:
            stream = await self.open(pair)
            await stream.send(Ping(nonce))
            assert (await stream.receive())[0] == Pong(nonce)
            await stream.close()

        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(visit(nonce) for nonce in range(16)))

    async def test_close_is_seen_as_a_lost_peer_and_can_be_repeated(self, pair: tuple[Transport, Transport]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            await stream.close()
            await stream.close()
            with pytest.raises(PeerLost):
                await stream.send(Ping(1))
            with pytest.raises(PeerLost):
                await stream.receive()

    async def test_what_was_sent_before_a_close_arrives(self, pair: tuple[Transport, Transport]) -> None:
        _, client = pair

        async def speak_and_leave(stream: Stream) -> None:
            await stream.send(Pong(9))

        async with asyncio.timeout(DEADLINE_S):
            third = await self.make_peer()
            try:
                await third.listen(speak_and_leave)
                stream = await client.dial(third.peer, third.addresses)
                assert (await stream.receive())[0] == Pong(9)
                with pytest.raises(PeerLost):
                    await stream.receive()
            finally:
                await third.close()

    async def test_a_closed_peer_is_lost_then_unreachable(self, pair: tuple[Transport, Transport]) -> None:
        server, client = pair
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            await stream.send(Ping(1))
            await stream.receive()
            addresses = server.addresses
            await server.close()
            with pytest.raises(PeerLost):
                await stream.receive()
            started_s = running_s()
            with pytest.raises(PeerUnreachable):
                await client.dial(server.peer, addresses, deadline_s=2.0)
            assert running_s() - started_s < 4.0

    async def test_an_unknown_peer_is_unreachable(self, pair: tuple[Transport, Transport]) -> None:
        _, client = pair
        stranger = PeerId("12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf")
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(PeerUnreachable):
                await client.dial(stranger, ["/ip4/127.0.0.1/tcp/1"], deadline_s=2.0)

    @pytest.mark.parametrize(
        ("raw", "error"),
        [
            (PREFIX.pack(MAX_HEADER_BYTES + 1, 0), FrameTooLarge),
            (PREFIX.pack(10, MAX_BODY_BYTES + 1), FrameTooLarge),
            (PREFIX.pack(0xFFFFFFFF, 0xFFFFFFFF), FrameTooLarge),
            (PREFIX.pack(4, 0) + b"\xc1\xc1\xc1\xc1", BadFrame),
            (b"".join(encode(Ping(1)))[:-1] + b"\xc1", BadFrame),
            (b"".join(encode(step_of(4), [bytes(15)])), BadTensor),
        ],
    )
    async def test_hostile_bytes_raise_a_typed_error(
        self, pair: tuple[Transport, Transport], raw: bytes, error: type[ProtocolError]
    ) -> None:
        _, client = pair
        outcome: asyncio.Queue[BaseException] = asyncio.Queue()

        async def judge(stream: Stream) -> None:
            try:
                await stream.receive()
            except ProtocolError as failure:
                await outcome.put(failure)
            with pytest.raises(PeerLost):
                await stream.receive()

        async with asyncio.timeout(DEADLINE_S):
            third = await self.make_peer()
            try:
                await third.listen(judge)
                stream = await client.dial(third.peer, third.addresses)
                await stream.send_bytes(raw)  # type: ignore[attr-defined]  # both transports let tests be hostile
                assert type(await outcome.get()) is error
            finally:
                await third.close()

    async def test_a_tighter_limit_refuses_any_body(self, pair: tuple[Transport, Transport]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            stream = await self.open(pair)
            await stream.send(step_of(1), [bytes(4)])
            with pytest.raises(FrameTooLarge):
                await stream.receive(max_body_bytes=0)

    async def test_a_slow_reader_holds_the_sender_back(self, pair: tuple[Transport, Transport]) -> None:
        _, client = pair
        release = asyncio.Event()
        received = 0

        async def read_late(stream: Stream) -> None:
            nonlocal received
            await release.wait()
            for _ in range(64):
                await stream.receive()
                received += 1
            await stream.send(Pong(64))

        async with asyncio.timeout(DEADLINE_S):
            third = await self.make_peer()
            try:
                await third.listen(read_late)
                stream = await client.dial(third.peer, third.addresses)

                async def pour() -> None:
                    for _ in range(64):
                        await stream.send(step_of(1 << 18), [bytes(1 << 20)])

                pouring = asyncio.create_task(pour())
                done, _ = await asyncio.wait({pouring}, timeout=0.3)
                assert not done
                release.set()
                await pouring
                assert (await stream.receive())[0] == Pong(64)
                assert received == 64
            finally:
                release.set()
                await third.close()
