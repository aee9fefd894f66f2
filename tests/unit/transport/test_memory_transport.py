"""The in-process transport passes the conformance suite, and dies like a real one."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from conformance import TransportConformance, echo

from bsns.core.errors import PeerLost, PeerUnreachable
from bsns.protocol.inference import Ping, Pong
from bsns.transport.memory import MemoryNetwork
from bsns.transport.port import Transport


class TestMemoryTransport(TransportConformance):
    @pytest.fixture(autouse=True)
    def network(self) -> None:
        self.members = MemoryNetwork()

    async def make_peer(self) -> Transport:
        return self.members.transport(f"peer-{secrets.token_hex(4)}")


async def test_a_killed_peer_is_lost_then_unreachable() -> None:
    network = MemoryNetwork()
    server, client = network.transport("server"), network.transport("client")
    await server.listen(echo)
    stream = await client.dial(server.peer)
    waiting = asyncio.create_task(stream.receive())
    await asyncio.sleep(0)
    network.kill(server.peer)
    with pytest.raises(PeerLost):
        await waiting
    with pytest.raises(PeerLost):
        await stream.send(Ping(1))
    with pytest.raises(PeerUnreachable):
        await client.dial(server.peer)
    await client.close()


async def test_a_cut_parts_two_peers_until_it_heals() -> None:
    network = MemoryNetwork()
    server, client = network.transport("server"), network.transport("client")
    await server.listen(echo)
    stream = await client.dial(server.peer)
    network.cut(server.peer, client.peer)
    with pytest.raises(PeerLost):
        await stream.receive()
    with pytest.raises(PeerUnreachable):
        await client.dial(server.peer)
    network.heal(client.peer, server.peer)
    stream = await client.dial(server.peer)
    await stream.send(Ping(2))
    assert (await stream.receive())[0] == Pong(2)
    await client.close()
    await server.close()
