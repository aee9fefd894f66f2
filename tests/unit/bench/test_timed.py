"""Speeds of answers at once, from the times of their tokens, and chats with an API that breaks off."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from bsns.bench.timed import Api, api_rate, offered, together
from bsns.core.errors import PeerFailed, PeerTimedOut

ONE = b"".join(
    b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"
    for delta in ({"role": "assistant", "content": ""}, {"content": "a"})
)
MORE = b'data: {"choices": [{"index": 0, "delta": {"content": "b"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 30, "total_tokens": 31}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_speed_is_taken_while_all_answers_are_under_way() -> None:
    assert together([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]]) == pytest.approx(6 / 3)
    assert together([[0.0, 0.5, 1.0]]) == pytest.approx(2.0)


def test_answers_one_after_the_other_are_taken_from_the_first_token_to_the_last() -> None:
    assert together([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]) == pytest.approx(1.0)
    assert together([[0.0, 1.0, 2.0], []]) == pytest.approx(1.0)


@pytest.mark.parametrize("times", [[], [[]], [[1.0]], [[1.0], [1.0]]])
def test_no_speed_without_two_tokens(times: list[list[float]]) -> None:
    with pytest.raises(PeerTimedOut):
        together(times)


@asynccontextmanager
async def serving(*pieces: bytes, status: str = "200 OK", pause_s: float = 0.02) -> AsyncIterator[Api]:
    """An API whose every answer is these pieces; it never ends an answer without `DONE`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        models = head.startswith(b"GET")
        kind = b"application/json" if models else b"text/event-stream"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: ".encode() + kind + b"\r\n\r\n")
        for piece in (b'{"object": "list", "data": [{"id": "m", "object": "model"}]}',) if models else pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if not models and DONE not in pieces:
            await reader.read()  # until the client goes
            left.append(time.monotonic())
        writer.close()

    left: list[float] = []
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield Api(f"http://{host}:{port}/v1", "key", "m")
    finally:
        server.close()


async def test_pieces_of_text_are_timed_and_tokens_counted_where_the_api_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("bsns.bench.timed.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    async with serving(ONE, MORE, MORE, DONE) as api:
        plain = await api_rate(api, ["x"], 8, seconds=5.0)
    async with serving(ONE, MORE, MORE, USAGE, DONE) as api:
        counted = await api_rate(api, ["x"], 8, seconds=5.0)
    assert (plain, counted) == (1.0, 10.0)  # ten times the tokens in as many pieces


async def test_what_does_not_end_is_broken_off_and_what_came_is_counted() -> None:
    async with serving(ONE, MORE, MORE) as api, asyncio.timeout(10.0):
        assert await api_rate(api, ["x", "y"], 8, seconds=2.0) > 0
    async with serving(ONE) as api, asyncio.timeout(5.0):
        with pytest.raises(PeerTimedOut):
            await api_rate(api, ["x"], 8, seconds=0.3)


async def test_an_api_that_refuses_is_an_error() -> None:
    async with serving(DONE, status="500 Internal Server Error") as api:
        with pytest.raises(PeerFailed, match="did not answer"):
            await api_rate(api, ["x"], 8, seconds=5.0)


async def test_whether_an_api_has_its_model() -> None:
    async with serving() as api:
        assert await offered(api)
        assert not await offered(Api(api.url, "key", "another"))
    assert not await offered(Api("http://127.0.0.1:1/v1", "key", "m"))
