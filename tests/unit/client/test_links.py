"""Links and sessions of a client, against a node played by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from memory_swarm import until

from bsns.client.links import STANDSTILL_S, TURNS, Link, Links, split_rows
from bsns.client.session import Session
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, BsnsError, CacheFull, PeerFailed, PeerLost, PeerTimedOut, PeerUnreachable
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.protocol.frames import Message
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import (
    Close,
    Closed,
    Describe,
    Description,
    Failure,
    Open,
    Opened,
    Part,
    Ping,
    Pong,
    Result,
    There,
    Where,
)
from bsns.protocol.probing import Probe, Probed
from bsns.protocol.tensors import TensorSpec
from bsns.routing.chain import Hop
from bsns.transport.memory import MemoryNetwork, MemoryTransport
from bsns.transport.port import Stream

DEADLINE_S = 5.0
DESCRIPTION = Description(0, 4, 1, 100, 90, 0.001, 5, 6, 7)


class PlayedNode:
    """A node that answers as its `answers` say; None keeps silent."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.streams: list[Stream] = []
        self.answers: dict[type, Any] = {
            Open: lambda m: Opened(m.session, 42),
            Close: lambda m: Closed(m.session, 43),
            Ping: lambda m: Pong(m.nonce),
            Describe: lambda _: DESCRIPTION,
            Probe: lambda m: Probed(m.nonce),
        }

    async def serve(self, stream: Stream) -> None:
        self.streams.append(stream)
        while True:
            message, _ = await stream.receive()
            self.heard.append(message)
            answer = self.answers[type(message)](message)
            if answer is not None:
                await stream.send(answer)

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


class Ears:
    """What the links told."""

    def __init__(self) -> None:
        self.results: asyncio.Queue[tuple[PeerId, str, list[tuple[Part, memoryview]]]] = asyncio.Queue()
        self.failures: asyncio.Queue[tuple[PeerId, SessionId, BsnsError]] = asyncio.Queue()
        self.lost: asyncio.Queue[tuple[PeerId, BsnsError]] = asyncio.Queue()

    def links(self, transport: MemoryTransport) -> Links:
        return Links(
            transport.dial,
            lambda *told: self.results.put_nowait(told),
            lambda *told: self.failures.put_nowait(told),
            lambda *told: self.lost.put_nowait(told),
        )


class Scene:
    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.ears = Ears()
        self.links = self.ears.links(self.network.transport("client"))
        self.nodes: dict[str, PlayedNode] = {}

    async def node(self, name: str) -> PlayedNode:
        node = self.nodes[name] = PlayedNode()
        await self.network.transport(name).listen(node.serve)
        return node

    async def link(self, name: str) -> Link:
        return await self.links.to(PeerId(name))


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    async with asyncio.timeout(4 * DEADLINE_S):
        yield scene
    await scene.links.close()


def opening(session: int = 1) -> Open:
    return Open(SessionId(session), ModelId("m"), 0, 4, "float32", 10, 1, None)


async def test_each_question_gets_its_answer(scene: Scene) -> None:
    await scene.node("n")
    link = await scene.link("n")
    assert await link.open(opening(), DEADLINE_S) == 42
    assert await link.close_session(SessionId(1), DEADLINE_S) == 43
    assert 0 <= await link.ping() < DEADLINE_S
    assert 0 <= await link.probe(memoryview(bytes(4096))) < DEADLINE_S
    assert await asyncio.gather(link.describe(), link.describe()) == [DESCRIPTION, DESCRIPTION]


async def test_one_stream_for_all_sessions(scene: Scene) -> None:
    node = await scene.node("n")
    one, two = await asyncio.gather(scene.link("n"), scene.link("n"))
    assert one is two
    assert await asyncio.gather(*(one.open(opening(i), DEADLINE_S) for i in range(9))) == [42] * 9
    assert len(node.streams) == 1


async def test_a_refused_open_raises_what_the_node_said(scene: Scene) -> None:
    node = await scene.node("n")
    node.answers[Open] = lambda m: Failure(m.session, "CacheFull", "3 of 9 left")
    with pytest.raises(CacheFull, match="3 of 9 left"):
        await (await scene.link("n")).open(opening(), DEADLINE_S)
    assert scene.ears.failures.empty()


async def test_a_refused_probe_raises(scene: Scene) -> None:
    node = await scene.node("n")
    node.answers[Probe] = lambda m: Probed(m.nonce, 2.5)
    with pytest.raises(PeerFailed, match=r"n takes no more probes for 2.5 s"):
        await (await scene.link("n")).probe(memoryview(bytes(8)))


async def test_a_dropped_link_is_dialled_anew(scene: Scene) -> None:
    node = await scene.node("n")
    await (await scene.link("n")).ping()
    await scene.links.drop(PeerId("n"))
    await scene.links.drop(PeerId("nobody"))
    assert await (await scene.link("n")).ping() >= 0
    assert len(node.streams) == 2


async def test_failures_of_running_sessions_are_told(scene: Scene) -> None:
    node = await scene.node("n")
    await (await scene.link("n")).open(opening(), DEADLINE_S)
    await node.streams[0].send(Failure(SessionId(1), "FromTheFuture", "what?"))
    teller, session, error = await scene.ears.failures.get()
    assert (teller, session, error.code, error.message) == ("n", 1, "PeerFailed", "FromTheFuture: what?")


async def test_silence_is_a_typed_error(scene: Scene) -> None:
    node = await scene.node("n")
    for kind in (Open, Close, Ping, Describe, Probe):
        node.answers[kind] = lambda _: None
    link = await scene.link("n")
    for question in (
        link.open(opening(), 0.01),
        link.close_session(SessionId(1), 0.01),
        link.ping(0.01),
        link.describe(0.01),
        link.probe(memoryview(bytes(8)), 0.01),
    ):
        with pytest.raises(PeerTimedOut, match="n did not answer"):
            await question
    node.answers[Ping] = lambda m: Pong(m.nonce)
    assert await link.ping() >= 0  # late or lost answers confuse nobody


@pytest.mark.parametrize("late_s", [0.03, 0.3])
async def test_an_answer_that_is_there_counts_however_long_we_stood_still(scene: Scene, late_s: float) -> None:
    """As after a collection of garbage, or a lid that was closed: the deadline has passed, but not for want of it."""
    node = await scene.node("n")
    link = await scene.link("n")
    await link.ping()

    def answer(ping: Ping) -> Pong:
        time.sleep(0.05 + late_s)  # with it everything in this process
        return Pong(ping.nonce)

    node.answers[Ping] = answer
    assert await link.ping(0.05) >= 0.05 + late_s


@pytest.mark.parametrize("answers", [True, False])
async def test_who_stood_still_asks_for_the_answer_once_more(
    scene: Scene, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on its way still, if the whole machine stood still; but of a node that is frozen nothing comes."""
    node = await scene.node("n")
    link = await scene.link("n")
    await link.ping()
    pings: list[Ping] = []
    node.answers[Ping] = pings.append
    asked = asyncio.create_task(link.ping(0.1))
    await until(lambda: bool(pings))
    time.sleep(0.1 + STANDSTILL_S + 0.05)  # noqa: ASYNC251  it is to hold up everything in this process
    for _ in range(2 * TURNS):
        await asyncio.sleep(0)
    assert not asked.done()
    if answers:
        await node.streams[0].send(Pong(pings[0].nonce))
        assert await asked > STANDSTILL_S
    else:
        monkeypatch.setattr("bsns.client.links.STANDSTILL_S", -1.0)  # as if it stood still for ever
        with pytest.raises(PeerTimedOut):
            await asyncio.wait_for(asked, 5)


async def test_a_lost_node_ends_every_wait_and_the_next_use_dials_anew(scene: Scene) -> None:
    node = await scene.node("n")
    for kind in (Open, Close, Ping, Describe):
        node.answers[kind] = lambda _: None
    link = await scene.link("n")
    waits = [
        asyncio.create_task(wait)
        for wait in (
            link.open(opening(), DEADLINE_S),
            link.close_session(SessionId(2), DEADLINE_S),
            link.ping(DEADLINE_S),
            link.describe(DEADLINE_S),
        )
    ]
    await until(lambda: len(node.heard) == 4)
    scene.network.kill(PeerId("n"))
    assert [type(outcome) for outcome in await asyncio.gather(*waits, return_exceptions=True)] == [PeerLost] * 4
    assert (await scene.ears.lost.get())[0] == "n"
    with pytest.raises(PeerLost):
        await link.ping()
    with pytest.raises(PeerUnreachable):
        await scene.link("n")
    await scene.node("n")
    again = await scene.link("n")
    assert again is not link
    assert await again.ping() >= 0


@pytest.mark.parametrize(
    "message",
    [
        Ping(1),
        opening(),
        Refusal("BadFrame", "you spoke badly"),
        Result((Part(SessionId(1), 0, 1, 1),), ()),
        Result((Part(SessionId(1), 0, 1, -1),), (TensorSpec.raw("hidden", "float32", (0, 4)),)),
    ],
)
async def test_a_node_that_breaks_the_protocol_is_lost(scene: Scene, message: Message) -> None:
    node = await scene.node("n")
    link = await scene.link("n")
    await link.ping()
    await node.streams[0].send(message)
    peer, error = await scene.ears.lost.get()
    assert peer == "n"
    assert isinstance(error, PeerLost)
    assert link.lost is error


async def test_results_reach_their_listener(scene: Scene) -> None:
    node = await scene.node("n")
    await (await scene.link("n")).ping()
    parts = (Part(SessionId(1), 0, 5, 2), Part(SessionId(2), 0, 5, 0), Part(SessionId(3), 9, 1, 1))
    body = bytes(range(3 * 8))
    await node.streams[0].send(Result(parts, (TensorSpec.raw("hidden", "float32", (3, 2)),)), [body])
    peer, codec, results = await scene.ears.results.get()
    assert (peer, codec) == ("n", "raw")
    assert [(part.session, bytes(rows)) for part, rows in results] == [(1, body[:16]), (2, b""), (3, body[16:])]


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3,), (3, 2, 2)])
def test_results_whose_rows_do_not_add_up(shape: tuple[int, ...]) -> None:
    spec = TensorSpec.raw("hidden", "float32", shape)
    with pytest.raises(BadFrame):
        split_rows(Result((Part(SessionId(1), 0, 3, 3),), (spec,)), [memoryview(bytes(spec.nbytes))])


def session_over(scene: Scene, names: Sequence[str]) -> Session:
    route = tuple(Hop(PeerId(name), BlockRange(i, i + 1), (f"/{name}",)) for i, name in enumerate(names))
    return Session(scene.links, route, model=ModelId("m"), dtype="float32", max_tokens=10)


async def test_a_session_opens_on_every_stage_and_tells_each_its_neighbours(scene: Scene) -> None:
    nodes = [await scene.node(name) for name in "abc"]
    session = session_over(scene, "abc")
    await session.open()
    opened = [node.said(Open) for node in nodes]
    assert [len(messages) for messages in opened] == [1, 1, 1]
    assert [(m.start, m.end, m.depth, m.max_tokens) for (m,) in opened] == [(0, 1, 3, 10), (1, 2, 3, 10), (2, 3, 3, 10)]
    assert [(m.previous_peer, m.next_peer, m.next_addresses) for (m,) in opened] == [
        (None, "b", ("/b",)),
        ("a", "c", ("/c",)),
        ("b", None, ()),
    ]
    assert {m.session for (m,) in opened} == {session.id}
    assert session.first.peer == "a"
    await session.close()
    assert [node.said(Close) for node in nodes] == [[Close(session.id)]] * 3


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("how", ["refuses", "dead"])
async def test_a_session_that_cannot_open_everywhere_stays_open_nowhere(scene: Scene, bad: int, how: str) -> None:
    nodes = {name: await scene.node(name) for name in "abc"}
    name = "abc"[bad]
    if how == "refuses":
        nodes[name].answers[Open] = lambda m: Failure(m.session, "CacheFull", "none left")
    else:
        scene.network.kill(PeerId(name))
    session = session_over(scene, "abc")
    with pytest.raises(CacheFull if how == "refuses" else PeerUnreachable):
        await session.open(DEADLINE_S)
    for other in set("abc") - {name}:
        await until(lambda node=nodes[other]: node.said(Close) == [Close(session.id)])


async def test_in_line_a_session_opens_on_one_stage_after_the_other(scene: Scene) -> None:
    """So that it keeps no room on a later one while an earlier one has none."""
    nodes = {name: await scene.node(name) for name in "abc"}
    session = session_over(scene, "abc")
    nodes["b"].answers[Open] = lambda m: Failure(m.session, "CacheFull", "none left")
    with pytest.raises(CacheFull):
        await session.open(DEADLINE_S, in_line=True)
    await until(lambda: nodes["a"].said(Close) == [Close(session.id)])
    await (await scene.link("b")).ping()
    assert nodes["b"].said(Close) == [], "there it stands in line"
    assert [[m.waits for m in node.said(Open)] for node in nodes.values()] == [[True], [True], []]
    session.leave_line()
    await until(lambda: [len(node.said(Close)) for node in nodes.values()] == [2, 1, 0])


async def test_a_node_that_is_given_up_sees_the_stream_end_though_that_is_cancelled(scene: Scene) -> None:
    node = await scene.node("n")
    link = await scene.link("n")
    await link.ping()
    task = asyncio.create_task(link.give_up(PeerLost("silent")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: node.streams[0].closed)


async def test_a_stage_that_answers_too_late_is_closed_too(scene: Scene) -> None:
    """It may have reserved the session all the same."""
    nodes = {name: await scene.node(name) for name in "ab"}
    nodes["b"].answers[Open] = lambda _: None
    session = session_over(scene, "ab")
    with pytest.raises(PeerTimedOut):
        await session.open(0.05)
    await until(lambda: all(node.said(Close) == [Close(session.id)] for node in nodes.values()))


async def test_an_open_that_is_cancelled_is_closed_everywhere(scene: Scene) -> None:
    nodes = {name: await scene.node(name) for name in "ab"}
    nodes["b"].answers[Open] = lambda _: None
    session = session_over(scene, "ab")
    opening = asyncio.create_task(session.open(DEADLINE_S))
    await until(lambda: all(node.said(Open) for node in nodes.values()))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: all(node.said(Close) == [Close(session.id)] for node in nodes.values()))


async def test_session_ids_are_drawn_and_fit_the_wire(scene: Scene) -> None:
    ids = {session_over(scene, "a").id for _ in range(100)}
    assert len(ids) == 100
    assert all(0 <= number < 2**63 for number in ids)


async def test_closing_bears_dead_and_silent_stages(scene: Scene) -> None:
    nodes = {name: await scene.node(name) for name in "abc"}
    session = session_over(scene, "abc")
    await session.open()
    nodes["b"].answers[Close] = lambda _: None
    scene.network.kill(PeerId("a"))
    await session.close(0.05)
    assert nodes["c"].said(Close) == [Close(session.id)]


async def test_two_that_ask_how_far_a_session_is_both_hear_it(scene: Scene) -> None:
    node = await scene.node("n")
    link = await scene.link("n")
    node.answers[Where] = lambda m: None
    given_up = asyncio.create_task(link.where(SessionId(1), DEADLINE_S))
    await until(lambda: len(node.said(Where)) == 1)
    given_up.cancel()
    both = [asyncio.create_task(link.where(SessionId(1), DEADLINE_S)) for _ in range(2)]
    await until(lambda: len(node.said(Where)) == 3)
    for far in (3, 4, 5):
        await node.streams[0].send(There(SessionId(1), far, far))
    assert [(await told).given for told in both] == [4, 5], "the first answer is that to the first question"
    assert not link._wheres


async def test_a_question_over_a_closed_stream_is_nobodys_any_more(scene: Scene) -> None:
    """An error that is set on it later would be one that nobody has read."""
    await scene.node("n")
    link = await scene.link("n")
    await link._stream.close()
    with pytest.raises(PeerLost):
        await link.where(SessionId(1), DEADLINE_S)
    await link.give_up(PeerTimedOut("it fell silent"))
    assert all(future.cancelled() for asked in link._wheres.values() for future in asked)
