"""The listening socket: clients that do not finish saying what they want."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
from scripted_engine import ScriptedEngine, chat

from bsns.gateway import gate, server
from bsns.gateway.app import create_app
from bsns.gateway.grammar import Grammars
from bsns.gateway.server import Listener
from bsns.gateway.settings import Settings

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(chat(max_tokens=4)).encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
async def listener(
    engine: ScriptedEngine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Listener]:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    monkeypatch.setattr(gate, "BODY_S", 0.2)
    listener = Listener("127.0.0.1", 0, Settings(), "--port")
    listener.listen()
    serving = asyncio.create_task(listener.serve(create_app(engine, grammars, listener.settings), drain_s=1))
    yield listener
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


async def said(listener: Listener, what: bytes = b"") -> Connection:
    """A connection on which this is there before the server takes it, however long either may be held up."""
    connection = socket.create_connection((listener.host, listener.port))
    connection.sendall(what)
    return await asyncio.open_connection(sock=connection)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    (size,) = [int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")]
    return int(head.split()[1]), await reader.readexactly(size)


async def ended(*connections: Connection) -> None:
    """The server closes them, without another word."""
    async with asyncio.timeout(5):
        for reader, writer in connections:
            assert await reader.read() == b""
            writer.close()


async def test_a_head_that_does_not_come_ends_the_connection(listener: Listener) -> None:
    await ended(await said(listener), await said(listener, HEAD))


async def test_nor_does_it_go_on_for_ever_byte_by_byte(listener: Listener) -> None:
    reader, writer = await said(listener, HEAD + b"X-More: ")
    async with asyncio.timeout(5):
        while not reader.at_eof() and reader.exception() is None:
            writer.write(b"x")
            await asyncio.sleep(0.02)
        writer.close()


async def test_nor_does_the_head_of_a_second_request(listener: Listener) -> None:
    reader, writer = await said(listener, WHOLE)
    assert (await answer(reader))[0] == 200
    writer.write(HEAD)
    await ended((reader, writer))


async def test_a_body_that_does_not_come_is_answered(listener: Listener) -> None:
    async with asyncio.timeout(5):
        reader, writer = await said(listener, WHOLE[:-5])
        status, body = await answer(reader)
        assert (status, "body did not come" in json.loads(body)["error"]["message"]) == (408, True)
        writer.close()


async def test_an_answer_may_take_longer_than_a_request(listener: Listener, engine: ScriptedEngine) -> None:
    engine.stands.clear()
    async with asyncio.timeout(5):
        reader, writer = await said(listener, WHOLE)
        await asyncio.sleep(0.4)
        engine.stands.set()
        assert (await answer(reader))[0] == 200
        writer.close()
