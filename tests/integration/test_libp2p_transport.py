"""The libp2p transport passes the conformance suite, and leaves nothing behind however it ends."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from running_time import running_s

from bsns.core.errors import BadOption, NoSuchSwarm, PeerLost, PeerUnreachable, PortInUse
from bsns.protocol.inference import Ping, Pong
from bsns.swarm.identity import Identity
from bsns.transport.libp2p import Libp2pTransport
from bsns.transport.port import Transport

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "transport"))
from conformance import DEADLINE_S, TransportConformance, echo

PLACES = [str(Path(__file__).parents[1] / "unit" / "transport"), str(Path(__file__).parents[1])]
SERVER = """
import asyncio, sys
sys.path[:0] = sys.argv[1:]
from conformance import echo
from bsns.transport.libp2p import Libp2pTransport

async def main():
    transport = await Libp2pTransport.start(bytes(range(32)))
    await transport.listen(echo)
    print(transport.addresses[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class TestLibp2pTransport(TransportConformance):
    @pytest.fixture(autouse=True)
    async def started(self) -> AsyncIterator[None]:
        self.peers: list[Libp2pTransport] = []
        yield
        for peer in self.peers:
            await peer.close()

    async def make_peer(self) -> Transport:  # type: ignore[override]
        peer = await Libp2pTransport.start(secrets.token_bytes(32))
        self.peers.append(peer)
        return peer


def files_of(transport: Libp2pTransport) -> list[Path]:
    """The sockets of a transport and its daemon, and the identity file the daemon was started with."""
    (daemon,) = daemons_of(os.getpid())
    identity = next(word.removeprefix("-id=") for word in daemon.cmdline() if word.startswith("-id="))
    sockets = (transport.p2p._daemon_listen_maddr, transport.p2p._client_listen_maddr)
    return [Path(identity), *(Path(maddr["unix"]) for maddr in sockets)]


def daemons_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children(recursive=True) if "p2pd" in child.name()]


@pytest.fixture
def server() -> object:
    """An echo server in a process of its own; yields the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *PLACES],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    yield process, address
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


async def test_the_peer_id_contains_the_public_key() -> None:
    seed = secrets.token_bytes(32)
    transport = await Libp2pTransport.start(seed, listen=False)
    try:
        assert transport.peer == Identity(seed).peer
        assert transport.addresses == ()
    finally:
        await transport.close()


async def test_close_leaves_no_child_no_socket_and_no_file() -> None:
    transport = await Libp2pTransport.start(secrets.token_bytes(32))
    await transport.listen(echo)
    (daemon,) = daemons_of(os.getpid())
    identity, *sockets = files_of(transport)
    assert not identity.exists()
    assert sockets[0].exists()
    await transport.close()
    await transport.close()
    assert not daemon.is_running()
    assert not any(path.exists() for path in sockets)
    with pytest.raises(PeerUnreachable):
        await transport.dial(transport.peer)


async def test_a_killed_process_takes_its_daemon_along_and_is_lost_at_once(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server
    client = await Libp2pTransport.start(secrets.token_bytes(32), bootstrap=[address], listen=False)
    try:
        peer = Identity(bytes(range(32))).peer
        stream = await client.dial(peer)
        await stream.send(Ping(1))
        assert (await stream.receive())[0] == Pong(1)
        (daemon,) = daemons_of(process.pid)
        process.kill()
        started_s = running_s()
        with pytest.raises(PeerLost):
            await stream.receive()
        assert running_s() - started_s < 2.0
        daemon.wait(timeout=5)
        started_s = running_s()
        with pytest.raises(PeerUnreachable):
            await client.dial(peer, [address], deadline_s=3.0)
        assert running_s() - started_s < 4.0
    finally:
        await client.close()


async def test_an_unreachable_peer_is_given_up_at_the_deadline() -> None:
    """A port that accepts and stays silent, as a frozen node's does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        client = await Libp2pTransport.start(secrets.token_bytes(32), listen=False)
        try:
            started_s = running_s()
            with pytest.raises(PeerUnreachable):
                await client.dial(Identity.draw().peer, [f"/ip4/127.0.0.1/tcp/{port}"], deadline_s=0.5)
            assert running_s() - started_s < 1.5
        finally:
            await client.close()


async def test_a_dead_bootstrap_is_no_such_swarm() -> None:
    gone = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.draw().peer}"
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(NoSuchSwarm):
            await Libp2pTransport.start(secrets.token_bytes(32), bootstrap=[gone])
    assert not daemons_of(os.getpid())


async def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            await Libp2pTransport.start(secrets.token_bytes(32), port=port)
    first = await Libp2pTransport.start(secrets.token_bytes(32))
    try:
        port = int(first.addresses[0].split("/")[4])
        with pytest.raises(PortInUse):
            await Libp2pTransport.start(secrets.token_bytes(32), port=port)
    finally:
        await first.close()
    again = await Libp2pTransport.start(secrets.token_bytes(32), port=port)
    await again.close()


@pytest.mark.parametrize("options", [{"host": "example"}, {"bootstrap": ["nonsense"]}, {"port": 70000}])
async def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        await Libp2pTransport.start(secrets.token_bytes(32), **options)  # type: ignore[arg-type]


async def test_only_loopback_is_bound_by_default() -> None:
    transport = await Libp2pTransport.start(secrets.token_bytes(32))
    try:
        (daemon,) = daemons_of(os.getpid())
        listening = [one for one in daemon.net_connections() if one.status == psutil.CONN_LISTEN]
        assert listening
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
    finally:
        await transport.close()
