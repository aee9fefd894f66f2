"""What of a stream's bytes has not been taken, on real sockets."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest

from bsns.transport.backlog import backlog

SENT = 8 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell only what waits in this process")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_a_backlog_is_what_the_other_end_does_not_read(family: socket.AddressFamily) -> None:
    ours, theirs = socket.socketpair() if family == socket.AF_UNIX else _connected()
    for end in (ours, theirs):
        end.setblocking(False)
    _, writer = await asyncio.open_connection(sock=ours)
    assert backlog(writer.transport) == 0
    writer.write(bytes(SENT))
    await asyncio.sleep(0.05)
    waiting = backlog(writer.transport)
    assert waiting > writer.transport.get_write_buffer_size() > 0, "the kernel holds the rest"
    loop = asyncio.get_running_loop()
    left = SENT
    while left:
        left -= len(await loop.sock_recv(theirs, 1 << 20))
    async with asyncio.timeout(5.0):
        while backlog(writer.transport):  # noqa: ASYNC110  the kernel tells nobody
            await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()
    theirs.close()
    assert backlog(writer.transport) == 0, "of a closed one nothing is known"


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs
