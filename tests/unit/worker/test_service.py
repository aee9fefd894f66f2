"""Workers in conversation: what honest peers get, and what the others get instead."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from memory_swarm import MODEL, MemorySwarm, Node, until

from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerUnreachable
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.codecs import coded
from bsns.protocol.frames import MAX_BODY_BYTES, MAX_HEADER_BYTES, PREFIX, Message
from bsns.protocol.greeting import Refusal, Welcome
from bsns.protocol.inference import (
    MAX_PARTS,
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
    Reroute,
    Rerouted,
    Resize,
    Resized,
    Result,
    Step,
    There,
    Where,
)
from bsns.protocol.tensors import TensorSpec
from bsns.transport.memory import MemoryNetwork, MemoryStream
from bsns.transport.port import Stream
from bsns.worker.batching import Batch
from bsns.worker.relay import MOST_DIALS, Relay

HIDDEN = 4
DEADLINE_S = 5.0
HELD = BlockRange(0, 2)


class Adder:
    """An executor that adds one, knows which caches are open, and can be told to fail or to wait."""

    name = "adder"
    hidden_size = HIDDEN
    dtype = "float32"
    device = "cpu"

    def __init__(self, blocks: BlockRange = HELD) -> None:
        self.blocks = blocks
        self.open_sessions: set[SessionId] = set()
        self.error: Exception | None = None
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        self.batches: list[Batch] = []

    def open(self, session: SessionId, max_tokens: int) -> None:
        self.open_sessions.add(session)

    def close(self, session: SessionId) -> None:
        self.open_sessions.discard(session)

    def run(self, batch: Batch) -> list[memoryview]:
        self.running.set()
        assert self.may_run.wait(DEADLINE_S)
        self.batches.append(batch)
        if self.error is not None:
            raise self.error
        return [memoryview((np.frombuffer(work.hidden, np.float32) + 1).tobytes()) for work in batch.works]


class Caller:
    """The near end of a stream to a worker, spoken by hand."""

    def __init__(self, stream: MemoryStream) -> None:
        self.stream = stream

    async def say(self, message: Message, *buffers: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.stream.send(message, buffers)

    async def hear(self) -> tuple[Message, list[memoryview]]:
        async with asyncio.timeout(DEADLINE_S):
            return await self.stream.receive()

    async def far(self, session: SessionId) -> tuple[int, int]:
        """How far a session has come there."""
        there = await self.ask(Where(session))
        assert isinstance(there, There)
        return there.given, there.done

    async def ask(self, message: Message, *buffers: bytes) -> Message:
        await self.say(message, *buffers)
        return (await self.hear())[0]

    async def step(self, position: int, rows: int, *, wanted: int | None = None, session: int = 1) -> None:
        """Rows whose numbers are their position."""
        part = Part(SessionId(session), position, rows, rows if wanted is None else wanted)
        await self.say(*frame(part, hidden(position, rows)))

    async def failure(self) -> Failure:
        message, _ = await self.hear()
        assert isinstance(message, Failure)
        return message

    async def result(self) -> tuple[Result, np.ndarray[Any, Any]]:
        message, buffers = await self.hear()
        assert isinstance(message, Result)
        return message, np.frombuffer(buffers[0], np.float32).reshape(message.tensors[0].shape)


def hidden(position: int, rows: int) -> np.ndarray[Any, Any]:
    return np.repeat(np.arange(position, position + rows, dtype=np.float32)[:, None], HIDDEN, axis=1)


def frame(part: Part, values: np.ndarray[Any, Any]) -> tuple[Step, bytes]:
    return Step((part,), (TensorSpec.raw("hidden", "float32", values.shape),)), values.tobytes()


def opening(node: Node, session: int = 1, **changes: Any) -> Open:
    held = node.worker.sessions.ranges[0]
    plain = Open(SessionId(session), MODEL, held.start, held.end, "float32", 32, 1, None)
    return msgspec.structs.replace(plain, **changes)


class Bench:
    """Nodes with Adders, and callers."""

    def __init__(self, swarm: MemorySwarm) -> None:
        self.swarm = swarm
        self.executors: dict[str, Adder] = {}

    async def node(self, name: str, blocks: BlockRange = HELD, **limits: Any) -> Node:
        self.executors[name] = Adder(blocks)
        return await self.swarm.add_node(
            name, self.executors[name], block_count=8, context_tokens=64, **{"cache_tokens": 128, **limits}
        )

    async def call(self, node: Node, name: str = "client") -> Caller:
        known = self.swarm.network.reach(PeerId(""), PeerId(name))
        return Caller(await (known or self.swarm.network.transport(name)).dial(node.transport.peer))


@pytest.fixture
async def bench(swarm: MemorySwarm) -> AsyncIterator[Bench]:
    bench = Bench(swarm)
    yield bench
    for executor in bench.executors.values():
        executor.may_run.set()


async def serves(bench: Bench, node: Node) -> bool:
    """An honest client is served from open to close."""
    honest = await bench.call(node, "honest")
    assert isinstance(await honest.ask(opening(node, 4711)), Opened)
    await honest.step(0, 2, session=4711)
    _, rows = await honest.result()
    assert isinstance(await honest.ask(Close(SessionId(4711))), Closed)
    await honest.stream.close()
    return bool(np.array_equal(rows, hidden(0, 2) + 1))


async def test_open_step_close(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert await caller.ask(opening(node)) == Opened(SessionId(1), 96)
    await caller.step(0, 3, wanted=1)
    result, rows = await caller.result()
    (part,) = result.parts
    assert (part.session, part.position, part.rows, part.wanted) == (1, 0, 3, 1)
    assert len(part.hops) == 1
    assert np.array_equal(rows, hidden(2, 1) + 1)
    await caller.step(3, 2, wanted=0)
    result, rows = await caller.result()
    assert (result.parts[0].wanted, rows.shape) == (0, (0, HIDDEN))
    await caller.step(1, 2)  # back: overwrites
    assert np.array_equal((await caller.result())[1], hidden(1, 2) + 1)
    assert await caller.ask(Close(SessionId(1))) == Closed(SessionId(1), 128)
    assert bench.executors["n"].open_sessions == set()
    assert (node.worker.steps, node.worker.rows) == (3, 7)


async def test_small_talk(bench: Bench) -> None:
    node = await bench.node("n", BlockRange(1, 4))
    caller = await bench.call(node)
    assert await caller.ask(Ping(77)) == Pong(77)
    await caller.ask(opening(node))
    described = await caller.ask(Describe())
    assert isinstance(described, Description)
    assert (described.start, described.end, described.sessions) == (1, 4, 1)
    assert (described.cache_tokens, described.cache_tokens_left) == (128, 96)


async def test_a_frame_may_carry_many_sessions(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    for session in (1, 2, 3):
        assert isinstance(await caller.ask(opening(node, session)), Opened)
    parts = (Part(SessionId(1), 0, 2, 1), Part(SessionId(2), 5, 1, 1), Part(SessionId(3), 0, 1, 1))
    values = np.concatenate([hidden(10, 2), hidden(20, 1), hidden(30, 1)])
    await caller.say(Step(parts, (TensorSpec.raw("hidden", "float32", values.shape),)), values.tobytes())
    heard: dict[int, float] = {}
    failed: list[Failure] = []
    while len(heard) + len(failed) < 3:
        message, buffers = await caller.hear()
        if isinstance(message, Failure):
            failed.append(message)
            continue
        assert isinstance(message, Result)
        rows = np.frombuffer(buffers[0], np.float32).reshape(-1, HIDDEN)
        heard.update({part.session: float(row[0]) for part, row in zip(message.parts, rows, strict=True)})
    assert heard == {1: 12.0, 3: 31.0}  # each its own rows, though the one between them failed
    assert [(failure.session, failure.code) for failure in failed] == [(2, "PositionGap")]


@pytest.mark.parametrize("stages", [2, 3])
async def test_stages_pass_on_and_the_last_returns(bench: Bench, stages: int) -> None:
    nodes = [await bench.node(f"n{i}", BlockRange(2 * i, 2 * i + 2)) for i in range(stages)]
    callers = [await bench.call(node) for node in nodes]
    for i, (node, caller) in enumerate(zip(nodes, callers, strict=True)):
        opened = await caller.ask(
            opening(
                node,
                depth=stages,
                next_peer=f"n{i + 1}" if i + 1 < stages else None,
                previous_peer=f"n{i - 1}" if i else None,
            )
        )
        assert isinstance(opened, Opened)
    for position, rows in ((0, 5), (5, 1), (6, 1)):
        await callers[0].step(position, rows, wanted=1)
        result, values = await callers[-1].result()
        assert np.array_equal(values, hidden(position + rows - 1, 1) + stages)
        assert len(result.parts[0].hops) == stages
        assert all(inside_ms >= compute_ms >= 0 for inside_ms, compute_ms, _ in result.parts[0].hops)
    assert [node.worker.rows for node in nodes] == [7] * stages


def step_with(spec: TensorSpec, body: bytes, *parts: Part) -> tuple[Step, bytes]:
    return Step(parts, (spec,)), body


ONE = Part(SessionId(1), 0, 1, 1)
WRONG_FRAMES: dict[str, tuple[str, tuple[Message, bytes]]] = {
    "wrong dtype": ("BadTensor", step_with(TensorSpec.raw("hidden", "bfloat16", (1, HIDDEN)), bytes(8), ONE)),
    "wrong width": ("BadTensor", step_with(TensorSpec.raw("hidden", "float32", (1, 5)), bytes(20), ONE)),
    "wrong row count": ("BadTensor", step_with(TensorSpec.raw("hidden", "float32", (2, HIDDEN)), bytes(32), ONE)),
    "wrong rank": ("BadTensor", step_with(TensorSpec.raw("hidden", "float32", (HIDDEN,)), bytes(16), ONE)),
    "wrong name": ("BadTensor", step_with(TensorSpec.raw("h", "float32", (1, HIDDEN)), bytes(16), ONE)),
    "no tensor": ("BadTensor", (Step((ONE,), ()), b"")),
    "unknown dtype": ("BadTensor", step_with(TensorSpec("hidden", "complex64", (1, HIDDEN), 32), bytes(32), ONE)),
    "unknown codec": ("BadTensor", step_with(TensorSpec("hidden", "float32", (1, HIDDEN), 16, "zip"), bytes(16), ONE)),
    "lying about bytes": ("BadTensor", step_with(TensorSpec("hidden", "float32", (1, HIDDEN), 8), bytes(8), ONE)),
    "short body": ("BadTensor", step_with(TensorSpec.raw("hidden", "float32", (1, HIDDEN)), bytes(12), ONE)),
    "long body": ("BadTensor", step_with(TensorSpec.raw("hidden", "float32", (1, HIDDEN)), bytes(17), ONE)),
    "negative shape": ("BadTensor", step_with(TensorSpec("hidden", "float32", (-1, -4), 16), bytes(16), ONE)),
    "of another length than its codec's": (
        "BadTensor",
        step_with(TensorSpec("hidden", "float32", (1, HIDDEN), 16, "int8"), bytes(16), ONE),
    ),
    "wrong rank for a codec": ("BadTensor", step_with(TensorSpec("hidden", "float32", (4,), 6, "int8"), bytes(6), ONE)),
    "numbers no codec takes": (
        "BadTensor",
        step_with(TensorSpec("hidden", "int64", (1, HIDDEN), 6, "int8"), bytes(6), ONE),
    ),
    "no parts": ("BadFrame", (Step((), (TensorSpec.raw("hidden", "float32", (0, HIDDEN)),)), b"")),
    "no rows": (
        "BadFrame",
        step_with(TensorSpec.raw("hidden", "float32", (0, HIDDEN)), b"", Part(SessionId(1), 0, 0, 0)),
    ),
    "rows that cancel out": (
        "BadFrame",
        step_with(
            TensorSpec.raw("hidden", "float32", (1, HIDDEN)),
            bytes(16),
            Part(SessionId(1), 0, 2, 0),
            Part(SessionId(1), 0, -1, 0),
        ),
    ),
    "too many parts": (
        "BadFrame",
        step_with(
            TensorSpec.raw("hidden", "float32", (MAX_PARTS + 1, HIDDEN)),
            bytes(16 * (MAX_PARTS + 1)),
            *[ONE] * (MAX_PARTS + 1),
        ),
    ),
    "not for a stage": ("BadFrame", (Pong(1), b"")),
    "a second greeting": ("BadFrame", (Welcome(1, None), b"")),
}


@pytest.mark.parametrize("name", WRONG_FRAMES)
async def test_wrong_frames_are_refused_and_end_the_stream(bench: Bench, name: str) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    code, (message, body) = WRONG_FRAMES[name]
    answer = await caller.ask(message, body)
    assert isinstance(answer, Refusal)
    assert answer.code == code
    await until(lambda: len(node.worker.sessions) == 0)
    assert bench.executors["n"].open_sessions == set()
    assert bench.executors["n"].batches == []
    assert await serves(bench, node)


@pytest.mark.parametrize("changes", [{"takes": "zip"}, {"gives": "x" * 5000}])
async def test_codecs_that_a_stage_does_not_know(bench: Bench, changes: dict[str, str]) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    answer = await caller.ask(opening(node, **changes))
    assert isinstance(answer, Failure)
    assert answer.code == "NotHere"
    assert "this node knows codecs raw, bf16, int8" in answer.message
    assert len(answer.message) < 200
    assert await serves(bench, node)


async def test_a_step_in_another_codec_than_its_session_was_opened_with(bench: Bench) -> None:
    """It is refused, and the stream's other sessions go on."""
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node, takes="int8")), Opened)
    assert isinstance(await caller.ask(opening(node, session=2)), Opened)
    await caller.step(0, 1)
    failure = await caller.failure()
    assert (failure.session, failure.code, failure.about) == (1, "BadFrame", None)
    assert "a step in raw for a session that was opened with int8" in failure.message
    await caller.step(0, 1, session=2)
    result, values = await caller.result()
    assert result.parts[0].session == 2
    assert values.tolist() == [[1.0] * HIDDEN]
    assert await caller.far(SessionId(1)) == (0, 0)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (PREFIX.pack(MAX_HEADER_BYTES + 1, 0), "FrameTooLarge"),
        (PREFIX.pack(10, MAX_BODY_BYTES + 1), "FrameTooLarge"),
        (b"\xff" * 64, "FrameTooLarge"),
        (b"GET / HTTP/1.1\r\nHost: bsns\r\n\r\n", "FrameTooLarge"),
        (PREFIX.pack(4, 0) + b"\xc1\xc1\xc1\xc1", "BadFrame"),
        (PREFIX.pack(6, 0) + b"\x81\xa4type\xa4", "BadFrame"),
        (PREFIX.pack(0, 0), "BadFrame"),
    ],
)
async def test_garbage_is_refused(bench: Bench, data: bytes, code: str) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    await caller.stream.send_bytes(data)
    answer, _ = await caller.hear()
    assert isinstance(answer, Refusal)
    assert answer.code == code
    await until(lambda: len(node.worker.sessions) == 0)
    assert await serves(bench, node)


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (Part(SessionId(1), 1, 1, 1), "PositionGap"),
        (Part(SessionId(1), -1, 1, 1), "BadFrame"),
        (Part(SessionId(1), 0, 1, 2), "BadFrame"),
        (Part(SessionId(1), 0, 1, -1), "BadFrame"),
        (Part(SessionId(1), 0, 33, 0), "BadFrame"),
        (Part(SessionId(2), 0, 1, 1), "UnknownSession"),
        (Part(SessionId(-9), 0, 1, 1), "UnknownSession"),
    ],
)
async def test_wrong_parts_fail_their_session_alone(bench: Bench, part: Part, code: str) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    await caller.say(*frame(part, hidden(0, part.rows)))
    failure = await caller.failure()
    assert (failure.session, failure.code) == (part.session, code)
    await caller.step(0, 1)  # the stream, and the session, go on
    assert np.array_equal((await caller.result())[1], hidden(0, 1) + 1)


async def test_a_client_cannot_pile_up_steps(bench: Bench) -> None:
    """A step may be repeated, in place of what waits, but no session has more rows waiting than it reserved tokens."""
    node = await bench.node("n")
    node.worker.block_time_s = 1.0  # slow, so that batches run on the thread
    executor = bench.executors["n"]
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    executor.may_run.clear()
    await caller.step(0, 32)
    await until(executor.running.is_set)
    for rows in (32, 32, 20):
        await caller.step(0, rows)
    for position, rows in ((12, 12), (23, 1)):  # each goes on within the one before
        await caller.step(position, rows)
    failure = await caller.failure()
    assert (failure.session, failure.code) == (1, "BadFrame")
    assert "32 rows wait" in failure.message
    executor.may_run.set()
    for position, rows in ((0, 32), (0, 20), (12, 12)):
        assert np.array_equal((await caller.result())[1], hidden(position, rows) + 1)
    await caller.step(0, 32)
    assert np.array_equal((await caller.result())[1], hidden(0, 32) + 1)


async def test_a_step_that_follows_what_was_refused_or_cut_off_is_nobody_elses_trouble(bench: Bench) -> None:
    """Its output joins nothing in the journal; the batch's other sessions get theirs."""
    node, after = await bench.node("n"), await bench.node("m")
    executor = bench.executors["n"]
    onward = {"next_peer": PeerId("m"), "next_addresses": after.transport.addresses, "depth": 2}
    bad, honest, other = [await bench.call(node, name) for name in ("bad", "honest", "other")]
    assert isinstance(await bad.ask(opening(node, 1, takes="int8", previous_peer=PeerId("x"), **onward)), Opened)
    assert isinstance(await honest.ask(opening(node, 2)), Opened)
    assert isinstance(await other.ask(opening(node, 3)), Opened)
    node.worker.block_time_s = 1.0  # slow, so that batches run on the thread
    executor.may_run.clear()
    await other.step(0, 1, session=3)
    await until(executor.running.is_set)
    spec = coded("hidden", "float32", (1, HIDDEN), "int8")
    for position, scales in ((0, b"\xff"), (1, b"\0")):  # the first has scales that are no numbers
        part = Part(SessionId(1), position, 1, 1, turn=position)
        await bad.say(Step((part,), (spec,)), scales * spec.nbytes)
    for position in range(2):
        await honest.step(position, 1, session=2)
    session = node.worker.sessions.get(SessionId(1))
    assert session is not None
    await until(lambda: session.waiting == 2)
    executor.may_run.set()
    for position in range(2):
        assert np.array_equal((await honest.result())[1], hidden(position, 1) + 1)
    assert (session.end, session.done) == (2, 0)


async def test_what_waits_for_a_session_that_is_given_another_room_is_dropped(bench: Bench) -> None:
    node = await bench.node("n")
    executor = bench.executors["n"]
    caller, other = await bench.call(node, "caller"), await bench.call(node, "other")
    assert isinstance(await caller.ask(opening(node, 1)), Opened)
    assert isinstance(await other.ask(opening(node, 2)), Opened)
    node.worker.block_time_s = 1.0
    executor.may_run.clear()
    await other.step(0, 1, session=2)
    await until(executor.running.is_set)
    await caller.step(0, 3)
    session = node.worker.sessions.get(SessionId(1))
    assert session is not None
    await until(lambda: session.waiting == 3)
    assert await caller.ask(Resize(SessionId(1), 32, 0)) == Resized(SessionId(1))
    assert session.waiting == 0
    executor.may_run.set()
    await caller.step(0, 2)
    assert np.array_equal((await caller.result())[1], hidden(0, 2) + 1)


async def test_refused_rows_do_not_stay_in_memory_with_their_frame(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    step, body = frame(Part(SessionId(1), 0, 1, 1), hidden(0, 31))
    await caller.say(Step((*step.parts, Part(SessionId(2), 0, 30, 0)), step.tensors), body)
    assert (await caller.failure()).session == 2
    await caller.result()
    (work,) = bench.executors["n"].batches[0].works
    assert isinstance(work.hidden, bytes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "another"}, "NotHere"),
        ({"end": 3}, "NotHere"),
        ({"dtype": "bfloat16"}, "NotHere"),
        ({"max_tokens": 65}, "BadFrame"),
        ({"max_tokens": -1}, "BadFrame"),
        ({"start": 1, "end": 1}, "BadFrame"),
    ],
)
async def test_refused_opens(bench: Bench, changes: dict[str, Any], code: str) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    answer = await caller.ask(opening(node, **changes))
    assert isinstance(answer, Failure)
    assert (answer.session, answer.code) == (1, code)
    assert len(node.worker.sessions) == 0
    assert await serves(bench, node)


async def test_a_full_cache_refuses_and_says_how_much_is_left(bench: Bench) -> None:
    node = await bench.node("n", cache_tokens=50)
    caller = await bench.call(node)
    assert await caller.ask(opening(node, 1)) == Opened(SessionId(1), 18)
    answer = await caller.ask(opening(node, 2))
    assert isinstance(answer, Failure)
    assert (answer.code, "18 of 50" in answer.message) == ("CacheFull", True)
    await caller.step(0, 1)
    assert np.array_equal((await caller.result())[1], hidden(0, 1) + 1)  # nothing was evicted
    await caller.ask(Close(SessionId(1)))
    assert isinstance(await caller.ask(opening(node, 2)), Opened)


async def test_strangers_cannot_touch_a_session(bench: Bench) -> None:
    node = await bench.node("n")
    owner, stranger = await bench.call(node, "owner"), await bench.call(node, "stranger")
    assert isinstance(await owner.ask(opening(node)), Opened)
    await owner.step(0, 2)
    await owner.result()
    await stranger.step(0, 1)
    assert (await stranger.failure()).code == "UnknownSession"
    assert isinstance(await stranger.ask(Close(SessionId(1))), Closed)
    again = await stranger.ask(opening(node))
    assert isinstance(again, Failure)
    assert again.code == "BadFrame"
    await stranger.stream.close()
    await owner.step(2, 1)
    assert np.array_equal((await owner.result())[1], hidden(2, 1) + 1)
    assert [batch.rows for batch in bench.executors["n"].batches] == [2, 1]


async def test_a_failing_executor_fails_its_batch_and_not_the_worker(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    bench.executors["n"].error = RuntimeError("out of memory at 0xdeadbeef")
    await caller.step(0, 1)
    failure = await caller.failure()
    assert (failure.session, failure.code) == (1, "PeerFailed")
    assert "0xdeadbeef" not in failure.message
    bench.executors["n"].error = None
    await caller.step(1, 1)  # what the cache holds at 0 nobody knows: the session is gone, and has to be replayed
    assert (await caller.failure()).code == "UnknownSession"
    assert isinstance(await caller.ask(opening(node)), Opened)
    await caller.step(0, 1)
    assert np.array_equal((await caller.result())[1], hidden(0, 1) + 1)
    assert await serves(bench, node)


async def test_a_closed_sessions_late_failure_leaves_its_successor_alone(bench: Bench) -> None:
    node = await bench.node("n")
    node.worker.block_time_s = 1.0  # slow, so that batches run on the thread
    executor = bench.executors["n"]
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    executor.may_run.clear()
    executor.running.clear()
    await caller.step(0, 1)
    await until(executor.running.is_set)
    assert isinstance(await caller.ask(Close(SessionId(1))), Closed)
    assert isinstance(await caller.ask(opening(node)), Opened)  # the same id again: another session
    executor.error = RuntimeError("no")
    executor.may_run.set()
    await until(lambda: len(executor.batches) == 1)
    assert await caller.ask(Ping(5)) == Pong(5)  # and no Failure before it
    executor.error = None
    await caller.step(0, 1)
    assert np.array_equal((await caller.result())[1], hidden(0, 1) + 1)


async def test_a_failing_executor_of_a_later_stage_is_heard_by_the_client(bench: Bench) -> None:
    first, second = await bench.node("n0"), await bench.node("n1", BlockRange(2, 4))
    callers = [await bench.call(first), await bench.call(second)]
    await callers[0].ask(opening(first, next_peer="n1", depth=2))
    await callers[1].ask(opening(second, previous_peer="n0", depth=2))
    bench.executors["n1"].error = ValueError("no")
    await callers[0].step(0, 1)
    assert (await callers[1].failure()).code == "PeerFailed"


@pytest.mark.parametrize("how", ["close", "cut"])
async def test_a_client_that_goes_frees_its_cache_at_once(bench: Bench, how: str) -> None:
    node = await bench.node("n")
    leaving, staying = await bench.call(node, "leaving"), await bench.call(node, "staying")
    for session in (1, 2):
        assert isinstance(await leaving.ask(opening(node, session)), Opened)
    assert isinstance(await staying.ask(opening(node, 3)), Opened)
    await leaving.step(0, 1)
    if how == "close":
        await leaving.stream.close()
    else:
        leaving.stream.cut()
    await until(lambda: bench.executors["n"].open_sessions == {3})
    assert node.worker.sessions.cache_tokens_left == 96
    await staying.step(0, 1, session=3)
    assert np.array_equal((await staying.result())[1], hidden(0, 1) + 1)


async def test_a_client_that_came_anew_leaves_nothing_on_its_old_stream(bench: Bench) -> None:
    """Its old stream may end later than the new one begins: where its network was silent for a while, say."""
    node = await bench.node("n")
    old, new = await bench.call(node), await bench.call(node)
    for session in (1, 2):
        assert isinstance(await old.ask(opening(node, session)), Opened)
    assert await new.ask(opening(node, 1)) == Opened(SessionId(1), 64)
    await old.stream.close()
    await until(lambda: bench.executors["n"].open_sessions == {1})
    await new.step(0, 1)
    assert np.array_equal((await new.result())[1], hidden(0, 1) + 1)
    await new.stream.close()
    await until(lambda: bench.executors["n"].open_sessions == set())
    assert node.worker.sessions.cache_tokens_left == 128
    assert not node.worker._clients._opened_on


async def test_a_client_that_goes_while_it_opens_leaves_nothing(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    await caller.say(opening(node))
    await caller.stream.close()
    other = await bench.call(node, "other")
    assert await other.ask(Ping(1)) == Pong(1)
    await until(lambda: len(node.worker.sessions) == 0)
    assert node.worker.sessions.cache_tokens_left == 128
    assert bench.executors["n"].open_sessions == set()


async def test_a_dead_next_stage_fails_the_open(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    answer = await caller.ask(opening(node, next_peer="nobody", depth=2))
    assert isinstance(answer, Failure)
    assert (answer.session, answer.code) == (1, "PeerUnreachable")
    assert "nobody" in answer.message
    assert node.worker.sessions.cache_tokens_left == 128
    assert bench.executors["n"].open_sessions == set()
    assert await serves(bench, node)


async def test_whoever_names_wrong_addresses_of_a_next_stage_holds_up_nobody_else() -> None:
    network = MemoryNetwork()
    near, far = network.transport("near"), network.transport("far")
    await far.listen(lambda _: asyncio.Event().wait())  # type: ignore[arg-type, return-value]
    dialled: list[Sequence[str]] = []

    async def dial(peer: PeerId, addresses: Sequence[str]) -> Stream:
        dialled.append(addresses)
        if "wrong" in addresses:
            await asyncio.Event().wait()
        return await near.dial(peer, addresses)

    relay = Relay(dial, lambda *_: None, lambda *_: None)
    far_away = [asyncio.create_task(relay.connect(far.peer, ("wrong",), PeerId("liar"))) for _ in range(3)]
    await until(lambda: bool(dialled))
    honest = asyncio.gather(*(relay.connect(far.peer, far.addresses, PeerId("honest")) for _ in range(3)))
    await until(honest.done, 1)
    await honest
    assert dialled == [("wrong",), far.addresses]
    for task in far_away:
        task.cancel()
    await asyncio.gather(*far_away, return_exceptions=True)
    for number in range(20):
        with pytest.raises(PeerUnreachable):
            await relay.connect(PeerId(f"nobody-{number}"), (), PeerId("honest"))
    gc.collect()
    assert len(relay._locks) < 5  # nothing is kept of those asked for
    await relay.close()
    for transport in (near, far):
        await transport.close()


class Silent:
    """A network in which nobody answers, until they are let."""

    def __init__(self) -> None:
        self.dialled: list[PeerId] = []
        self.answers = asyncio.Event()

    async def dial(self, peer: PeerId, addresses: Sequence[str]) -> Stream:
        self.dialled.append(peer)
        await self.answers.wait()
        raise PeerUnreachable("nobody there")


async def test_a_client_has_so_many_peers_dialled_at_once_and_holds_up_nobody_else() -> None:
    silent = Silent()
    relay = Relay(silent.dial, lambda *_: None, lambda *_: None)
    many = [asyncio.create_task(relay.connect(PeerId(f"p{n}"), (), PeerId("greedy"))) for n in range(100)]
    await until(lambda: len(silent.dialled) == MOST_DIALS)
    for task in many[: 2 * MOST_DIALS]:
        task.cancel()  # what is being dialled for them holds a connection all the same
    await asyncio.sleep(0.02)
    assert len(silent.dialled) == MOST_DIALS
    other = asyncio.create_task(relay.connect(PeerId("q"), (), PeerId("modest")))
    await until(lambda: silent.dialled[-1] == "q")
    silent.answers.set()
    said = await asyncio.gather(*many, other, return_exceptions=True)
    assert len(silent.dialled) == 100 - MOST_DIALS + 1
    assert all(isinstance(each, PeerUnreachable) for each in said[2 * MOST_DIALS :])
    await relay.close()


async def test_a_peer_that_answers_when_nobody_waits_for_it_any_more_is_not_dialled_again() -> None:
    network, may_go, dials = MemoryNetwork(), asyncio.Event(), list[PeerId]()
    near, far = network.transport("near"), network.transport("far")
    await far.listen(lambda _: asyncio.Event().wait())  # type: ignore[arg-type, return-value]

    async def dial(peer: PeerId, addresses: Sequence[str]) -> Stream:
        dials.append(peer)
        await may_go.wait()
        return await near.dial(peer, addresses)

    relay = Relay(dial, lambda *_: None, lambda *_: None)
    given_up = asyncio.create_task(relay.connect(far.peer, far.addresses, PeerId("gone")))
    await until(lambda: bool(dials))
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    may_go.set()
    await until(lambda: not relay._dialling)
    await relay.connect(far.peer, far.addresses, PeerId("other"))
    assert dials == [far.peer]
    await relay.close()
    for transport in (near, far):
        await transport.close()


async def test_of_the_neighbours_a_session_is_given_only_the_last_is_waited_for(bench: Bench) -> None:
    node, _ = await bench.node("n0"), await bench.node("n1", BlockRange(2, 4))
    caller, silent = await bench.call(node), Silent()
    assert isinstance(await caller.ask(opening(node, next_peer="n1", depth=2)), Opened)
    node.worker._relay._dial = silent.dial
    for number in range(200):
        await caller.say(Reroute(SessionId(1), None, PeerId(f"p{number}"), passes_from=0))
        await until(lambda number=number: len(silent.dialled) == min(number + 1, MOST_DIALS))  # type: ignore[misc]
    assert await caller.ask(Ping(1)) == Pong(1)  # it has read them all
    assert len(silent.dialled) == MOST_DIALS
    assert len(node.worker._reaching) == 1
    silent.answers.set()
    answered, _ = await caller.hear()
    assert isinstance(answered, Rerouted)
    assert answered.code == "PeerUnreachable"
    await until(lambda: not node.worker._reaching)
    assert len(silent.dialled) == MOST_DIALS + 1
    assert silent.dialled[-1] == "p199"


async def test_a_next_stage_that_dies_fails_the_sessions_that_need_it(bench: Bench) -> None:
    first, second = await bench.node("n0"), await bench.node("n1", BlockRange(2, 4))
    caller, behind = await bench.call(first), await bench.call(second)
    assert isinstance(await caller.ask(opening(first, next_peer="n1", depth=2)), Opened)
    assert isinstance(await behind.ask(opening(second, previous_peer="n0", depth=2)), Opened)
    await caller.step(0, 1)
    await behind.result()
    bench.swarm.network.kill(PeerId("n1"))
    for position in (1, 2):  # the stream found broken, then the peer found gone
        await caller.step(position, 1)
        failure = await caller.failure()
        assert (failure.session, failure.code in ("PeerLost", "PeerUnreachable")) == (1, True)
        assert "n1" in failure.message
    assert await serves(bench, first)


async def test_a_session_gone_from_the_next_stage_alone_fails_alone(bench: Bench) -> None:
    """Clients close on all stages at once: a step under way then finds the next stage ahead of its own."""
    first, second = await bench.node("n0"), await bench.node("n1", BlockRange(2, 4))
    caller, behind = await bench.call(first), await bench.call(second)
    other, other_behind = await bench.call(first, "other"), await bench.call(second, "other")
    for session, entry, end in ((1, caller, behind), (2, other, other_behind)):
        assert isinstance(await entry.ask(opening(first, session, next_peer="n1", depth=2)), Opened)
        assert isinstance(await end.ask(opening(second, session, previous_peer="n0", depth=2)), Opened)
    assert isinstance(await behind.ask(Close(SessionId(1))), Closed)
    await caller.step(0, 1)
    failure = await caller.failure()
    assert (failure.session, failure.code) == (1, "UnknownSession")
    await other.step(0, 1, session=2)
    assert np.array_equal((await other_behind.result())[1], hidden(0, 1) + 2)


async def test_a_closed_sessions_late_result_is_not_delivered(bench: Bench) -> None:
    node = await bench.node("n")
    node.worker.block_time_s = 1.0  # slow, so that batches run on the thread
    executor = bench.executors["n"]
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    executor.may_run.clear()
    executor.running.clear()
    await caller.step(0, 1)
    await until(executor.running.is_set)
    await caller.step(1, 1)  # waits behind it
    assert isinstance(await caller.ask(Close(SessionId(1))), Closed)
    assert isinstance(await caller.ask(opening(node)), Opened)  # the same id again: another session
    executor.may_run.set()
    await until(lambda: len(executor.batches) == 1)
    await caller.step(0, 3, wanted=1)
    result, rows = await caller.result()
    assert (result.parts[0].position, result.parts[0].rows) == (0, 3)
    assert np.array_equal(rows, hidden(2, 1) + 1)
    assert await caller.ask(Ping(5)) == Pong(5)
    assert [batch.rows for batch in executor.batches] == [1, 3]  # the step that waited never ran


async def test_idle_sessions_expire(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsns.worker.service.SWEEP_S", 0.0)
    node = await bench.node("n", idle_s=0.0)
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    await until(lambda: len(node.worker.sessions) == 0)
    assert bench.executors["n"].open_sessions == set()
    await caller.step(0, 1)
    assert (await caller.failure()).code == "UnknownSession"


async def test_short_batches_run_on_the_loop_and_long_ones_on_a_thread(bench: Bench) -> None:
    node = await bench.node("n")
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    await caller.step(0, 1)
    await caller.result()
    assert not computing()
    node.worker.block_time_s = 1.0
    await caller.step(1, 1)
    _, rows = await caller.result()
    assert np.array_equal(rows, hidden(1, 1) + 1)
    assert computing()
    await node.worker.close()
    assert not computing()


def computing() -> bool:
    return any(thread.name.startswith("compute") for thread in threading.enumerate())


async def test_a_session_can_be_led_around_a_lost_stage(bench: Bench) -> None:
    """What went to the lost stage goes to its spare again; what the client has heard of is not passed on twice."""
    first, lost, spare = [await bench.node(name) for name in ("first", "lost", "spare")]
    callers = {name: await bench.call(bench.swarm.nodes[name]) for name in ("first", "lost", "spare")}
    onward = {"depth": 2, "next_peer": PeerId("lost"), "next_addresses": lost.transport.addresses}
    assert isinstance(await callers["lost"].ask(opening(lost, depth=2, previous_peer=PeerId("first"))), Opened)
    assert isinstance(await callers["first"].ask(opening(first, **onward)), Opened)
    await callers["first"].step(0, 3)
    await callers["lost"].result()
    bench.swarm.network.kill(PeerId("lost"))
    failure = await callers["first"].failure()
    assert (failure.code, failure.about) == ("PeerLost", "lost")
    await callers["first"].step(3, 2, wanted=2)  # into the void: it is kept all the same
    assert (await callers["first"].failure()).about == "lost"
    taking = opening(spare, depth=2, previous_peer=PeerId("first"), passes_from=2)
    assert isinstance(await callers["spare"].ask(taking), Opened)
    around = Reroute(SessionId(1), None, PeerId("spare"), spare.transport.addresses, again=True)
    assert await callers["first"].ask(around) == Rerouted(SessionId(1))
    result, _ = await callers["spare"].result()
    assert [(part.position, part.rows, part.wanted) for part in result.parts] == [(2, 1, 1)]
    result, rows = await callers["spare"].result()
    assert [(part.position, part.rows, part.wanted) for part in result.parts] == [(3, 2, 2)]
    assert np.array_equal(rows, hidden(3, 2) + 2)
    assert await callers["spare"].far(SessionId(1)) == (5, 5)
    await callers["first"].step(5, 1, wanted=1)
    _, rows = await callers["spare"].result()
    assert np.array_equal(rows, hidden(5, 1) + 2)


async def test_nobody_else_may_lead_a_session_around_or_ask_for_it(bench: Bench) -> None:
    first, second = await bench.node("first"), await bench.node("second")
    caller, stranger = await bench.call(first), await bench.call(first, "stranger")
    onward = {"depth": 2, "next_peer": PeerId("second"), "next_addresses": second.transport.addresses}
    assert isinstance(await caller.ask(opening(first, **onward)), Opened)
    theft = Reroute(SessionId(1), None, PeerId("stranger"), (), again=True)
    answered = await stranger.ask(theft)
    assert isinstance(answered, Rerouted)
    assert answered.code == "UnknownSession"
    assert await stranger.far(SessionId(1)) == (-1, -1)
    session = first.worker.sessions.get(SessionId(1))
    assert session is not None
    assert session.next == "second"
    for bad in (
        Reroute(SessionId(1), None, None),  # it would become the last stage
        Reroute(SessionId(1), None, PeerId("third")),  # which would not have what came before
        Reroute(SessionId(1), None, PeerId("x" * 300), (), again=True),
        Reroute(SessionId(1), None, PeerId("second"), ("/a",) * 17, again=True),
    ):
        answered = await caller.ask(bad)
        assert isinstance(answered, Rerouted)
        assert answered.code == "BadFrame"
    gone = await caller.ask(Reroute(SessionId(1), None, PeerId("nowhere"), (), again=True))
    assert isinstance(gone, Rerouted)
    assert (gone.code, gone.about) == ("PeerUnreachable", "nowhere")
    assert session.next == "second"
    assert await serves(bench, first)


async def test_a_session_has_one_replay_at_a_time_and_none_when_it_is_closed(bench: Bench) -> None:
    first, _ = await bench.node("first"), await bench.node("second")
    caller = await bench.call(first)
    onward = {"depth": 2, "next_peer": PeerId("second"), "next_addresses": ()}
    assert isinstance(await caller.ask(opening(first, **onward)), Opened)
    bench.swarm.network.silence(PeerId("first"), PeerId("nowhere"))
    await until(lambda: not first.worker._reaching)
    before = len(first.worker._tasks)
    for _ in range(50):
        await caller.say(Reroute(SessionId(1), None, PeerId("nowhere"), (), again=True))
    await until(lambda: len(first.worker._replays) == 1)
    await asyncio.sleep(0.05)
    assert len(first.worker._tasks) <= before + 1
    await caller.ask(Close(SessionId(1)))
    await until(lambda: not first.worker._replays and len(first.worker._tasks) == before)
    loop = Reroute(SessionId(1), PeerId("x"), PeerId("x"), (), again=True)
    assert isinstance(await caller.ask(opening(first, **onward)), Opened)
    answered = await caller.ask(loop)
    assert isinstance(answered, Rerouted)
    assert answered.code == "BadFrame"


async def test_a_node_at_rest_measures_itself_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes to a node that says it is slow, so that no step would ever show that it is not any more."""
    monkeypatch.setattr("bsns.worker.service.SWEEP_S", 0.0)
    monkeypatch.setattr("bsns.worker.service.REST_S", 0.01)
    node = await bench.node("n")
    node.worker.block_time_s = 1.0
    await until(lambda: node.worker.block_time_s < 0.5)
    assert node.worker.steps == 0
    caller = await bench.call(node)
    assert isinstance(await caller.ask(opening(node)), Opened)
    await caller.step(0, 1)
    assert np.array_equal((await caller.result())[1], hidden(0, 1) + 1)
