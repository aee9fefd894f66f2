"""The address at which Prometheus reads: what it says, to whom, and how little a hostile reader can do."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from memory_swarm import until
from prometheus_client.core import CounterMetricFamily, Metric

from bsns.core.errors import BadOption, PortInUse
from bsns.node import scraping
from bsns.node.scraping import PLACES, Scraping, parse_place


class Figures:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> list[Metric]:
        self.reads += 1
        return [CounterMetricFamily("bsns_node_moves", "Moves", value=self.reads)]


class Alarm:
    """A threading.Timer that the test lets go off."""

    def __init__(self, started: list[Callable[[], None]], after_s: float, what: Callable[..., None], with_: Any):
        assert after_s == scraping.REQUEST_S
        self._started, self._what = started, partial(what, *with_)

    def start(self) -> None:
        self._started.append(self._what)

    def cancel(self) -> None:
        pass


@pytest.fixture
def figures() -> Figures:
    return Figures()


@pytest.fixture
async def open_(figures: Figures) -> AsyncIterator[Scraping]:
    served = Scraping("127.0.0.1", 0)
    served.begin(figures)
    yield served
    await served.close()


@pytest.fixture
def connections(open_: Scraping) -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for connection in made:
        connection.close()


def _port(served: Scraping) -> int:
    return httpx.URL(served.url).port or 0


async def _get(url: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.get(url, headers=headers)


async def test_it_says_what_the_loop_knows_at_most_once_a_second(
    open_: Scraping, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scraping.FRESH_S == 1.0
    monkeypatch.setattr(scraping, "FRESH_S", 3600.0)  # a second may pass between the two
    first, second = await _get(open_.url), await _get(open_.url)
    assert first.status_code == 200
    assert first.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "bsns_node_moves_total 1.0" in first.text
    assert "process_resident_memory_bytes" in first.text
    assert (second.text, figures.reads) == (first.text, 1)
    monkeypatch.setattr(scraping, "FRESH_S", 0.0)
    assert "bsns_node_moves_total 2.0" in (await _get(open_.url)).text


async def test_what_it_does_not_answer(open_: Scraping) -> None:
    assert (await _get(open_.url.replace("/metrics", "/"))).status_code == 404
    assert (await _get(open_.url, host="evil.example")).status_code == 403
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.post(open_.url)).status_code == 405


async def test_readers_that_send_nothing_or_read_nothing_are_hung_up_on(
    open_: Scraping, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take every place, a drop at a time, and the event loop does not notice."""
    hang_ups: list[Callable[[], None]] = []
    monkeypatch.setattr(scraping, "threading", SimpleNamespace(Timer=partial(Alarm, hang_ups)))
    for _ in range(PLACES):
        connection = socket.create_connection(("127.0.0.1", _port(open_)))
        connection.sendall(b"GET /met")
        connections.append(connection)
    await until(lambda: open_._server._places._value == 0 and len(hang_ups) == PLACES)
    with pytest.raises(httpx.HTTPError):
        await _get(open_.url)
    for hang_up in hang_ups:
        hang_up()

    def drip() -> bool:
        for connection in connections:
            try:
                connection.sendall(b"r")
            except OSError:
                continue  # hung up on
        return open_._server._places._value == PLACES

    await until(drip, 10)
    assert (await _get(open_.url)).status_code == 200


async def test_a_loop_that_is_busy_is_not_waited_for_for_ever(open_: Scraping, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as threads:
        patched.setattr(scraping, "LOOP_S", 0.1)
        # and this waits for it on the loop's own thread
        assert threads.submit(httpx.get, open_.url, trust_env=False).result(10).status_code == 503
    assert (await _get(open_.url)).status_code == 200


async def test_an_address_that_is_taken_is_a_users_mistake(open_: Scraping) -> None:
    with pytest.raises(PortInUse, match="--metrics"):
        Scraping("127.0.0.1", _port(open_))
    with pytest.raises(BadOption, match="no address"):
        Scraping("no.such.host.invalid", 0)


def test_places() -> None:
    assert parse_place("9464") == ("127.0.0.1", 9464)
    assert parse_place("0.0.0.0:9464") == ("0.0.0.0", 9464)
    assert parse_place("[::1]:0") == ("::1", 0)
    for wrong in ("", "here", "127.0.0.1:", "127.0.0.1:70000", "::1:9464", "a b:c"):
        with pytest.raises(BadOption, match="HOST:PORT"):
            parse_place(wrong)
