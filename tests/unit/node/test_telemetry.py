"""Traces: one span for an answer, and below it its hops, as clients and as nodes know them."""

from __future__ import annotations

import asyncio
import http.server
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import structlog
from memory_swarm import MODEL, MemorySwarm, StageShelf, answer, until
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from running_time import running_s
from tiny_models import prompt

from bsns.cli.telemetry import open_telemetry
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, PeerError, SwarmError
from bsns.core.ids import PeerId, SessionId
from bsns.node import telemetry as module
from bsns.node.telemetry import MOST_CHUNKS, Telemetry, endpoint_of
from bsns.protocol.frames import decode_header, encode
from bsns.protocol.inference import Open, Passed
from bsns.routing.chain import Hop
from bsns.transport.clock import MACHINE_CLOCK
from bsns.worker.torch_executor import TorchExecutor

CUTS = (0, 2, 5)


class Traced:
    """A swarm that is traced at both ends, and what was told."""

    def __init__(self, swarm: MemorySwarm, shelf: StageShelf, path: Path) -> None:
        self.swarm, self.stages, self.ends = swarm, shelf.stages(path, CUTS), shelf.ends(path)
        self.exporter = InMemorySpanExporter()
        self.telemetry = Telemetry("test", SimpleSpanProcessor(self.exporter))

    async def start(self, names: Sequence[str] = ("a0", "a1"), *, nodes: bool = True) -> None:
        for name in names:
            tracer = self.telemetry.stages(PeerId(name)) if nodes else None
            executor = TorchExecutor(self.stages[int(name[1])], dtype="float32")
            slow = 1e-3 if name[0] == "a" else 1.0
            await self.swarm.add_node(
                name, executor, block_count=CUTS[-1], context_tokens=4096, block_time_s=slow, tracer=tracer
            )
        self.client = self.swarm.client(
            self.ends, context_tokens=4096, keep_sessions=1, tracer=self.telemetry.answers("tiny")
        )

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def of(self, parent: ReadableSpan, name: str) -> list[ReadableSpan]:
        assert parent.context is not None
        within = parent.context.span_id
        return [span for span in self.spans(name) if span.parent is not None and span.parent.span_id == within]


@pytest.fixture
def traced(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> Traced:
    return Traced(swarm, shelf, tiny_model("llama"))


def said(span: ReadableSpan, name: str) -> object:
    return (span.attributes or {})[f"bsns.{name}"]


async def test_an_answer_and_its_hops(traced: Traced) -> None:
    await traced.start()
    began_ns = time.time_ns()
    stats = Stats()
    with structlog.contextvars.bound_contextvars(request_id="r-9"):
        async for _ in traced.client.stream(prompt(200), SamplingOptions(max_tokens=6), stats):
            pass
    (whole,) = traced.spans("answer")
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.request.model"] == "tiny"
    assert (whole.attributes["gen_ai.usage.input_tokens"], whole.attributes["gen_ai.usage.output_tokens"]) == (200, 6)
    assert (said(whole, "request_id"), said(whole, "session")) == ("r-9", stats.session)
    assert said(whole, "route") == ("a0 0:2", "a1 2:5")
    assert whole.status.status_code is StatusCode.UNSET
    prefills, decodes = traced.of(whole, "prefill"), traced.of(whole, "decode")
    assert [(said(s, "peer"), said(s, "blocks"), said(s, "rows")) for s in prefills] == [
        ("a0", "0:2", 128),
        ("a1", "2:5", 128),
        ("a0", "0:2", 72),
        ("a1", "2:5", 72),
    ]
    assert [(said(s, "peer"), said(s, "steps"), said(s, "rows")) for s in decodes] == [("a0", 5, 5), ("a1", 5, 5)]
    assert whole.start_time is not None
    assert whole.end_time is not None
    assert began_ns - 1e6 <= whole.start_time <= whole.end_time <= time.time_ns() + 1e6
    for first, second in ((prefills[0], prefills[1]), (prefills[2], prefills[3])):
        times = (whole.start_time, first.start_time, first.end_time, second.start_time, second.end_time, whole.end_time)
        assert list(times) == sorted(times)  # type: ignore[type-var]
    assert all(0 <= said(s, "compute_ms") <= said(s, "inside_ms") + 1e-6 for s in prefills)  # type: ignore[operator]


async def test_nodes_put_their_spans_below_the_answer_that_asked(traced: Traced) -> None:
    await traced.start()
    first = prompt(100)
    tokens = await answer(traced.client, first, SamplingOptions(max_tokens=40))
    await until(lambda: len(traced.spans("stage")) == 2)  # parked: over, as far as this answer goes
    await answer(traced.client, [*first, *tokens, 3], SamplingOptions(max_tokens=4))
    await until(lambda: len(traced.spans("stage")) == 4)
    before, after = traced.spans("answer")
    for whole, rows in ((before, (100, 39)), (after, (1, 3))):
        assert whole.context is not None
        stages = traced.of(whole, "stage")
        assert {(said(s, "peer"), said(s, "client"), said(s, "blocks")) for s in stages} == {
            ("a0", "client-0", "0:2"),
            ("a1", "client-0", "2:5"),
        }
        for stage in stages:
            assert stage.context is not None
            assert stage.context.trace_id == whole.context.trace_id
            (decode,) = traced.of(stage, "decode")
            prefilled = sum(said(s, "rows") for s in traced.of(stage, "prefill"))  # type: ignore[misc]
            assert said(decode, "rows") == rows[1]
            assert rows[0] <= prefilled <= rows[0] + 2
    assert said(before, "session") == said(after, "session")


async def test_a_long_prompt_is_no_flood(traced: Traced) -> None:
    await traced.start()
    await answer(traced.client, prompt(128 * (MOST_CHUNKS + 3)), SamplingOptions(max_tokens=2))
    (whole,) = traced.spans("answer")
    prefills = traced.of(whole, "prefill")
    assert len(prefills) == 2 * (MOST_CHUNKS + 1)
    assert [said(s, "rows") for s in prefills if "bsns.steps" in (s.attributes or {})] == [3 * 128] * 2
    await until(lambda: len(traced.spans("stage")) == 2)
    for stage in traced.spans("stage"):
        assert len(traced.of(stage, "prefill")) == MOST_CHUNKS + 1


async def test_a_repair_is_an_event_and_failures_have_a_status(traced: Traced) -> None:
    await traced.start(("a0", "a1", "b1"), nodes=False)
    stream = traced.client.stream(prompt(20), SamplingOptions(max_tokens=12))
    await anext(stream)
    traced.swarm.network.kill(PeerId("a1"))
    async for _ in stream:
        pass
    (whole,) = traced.spans("answer")
    (rerouted,) = whole.events
    assert (rerouted.name, dict(rerouted.attributes or {})) == ("rerouted", {"bsns.route": ("a0 0:2", "b1 2:5")})
    assert {said(s, "peer") for s in traced.of(whole, "decode")} >= {"a0", "b1"}

    early = traced.client.stream(prompt(9), SamplingOptions(max_tokens=12))
    await anext(early)
    await early.aclose()
    assert said(traced.spans("answer")[-1], "closed") is True
    for name in ("a0", "b1"):
        traced.swarm.network.kill(PeerId(name))
    with pytest.raises((PeerError, SwarmError)):
        await anext(traced.client.stream(prompt(3), SamplingOptions(max_tokens=2)))
    failed = traced.spans("answer")[-1]
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description


@pytest.mark.parametrize("word", [math.nan, math.inf, -math.inf, -5.0, 1e300])
def test_what_nodes_say_of_their_times_is_taken_with_care(word: float, traced: Traced) -> None:
    spans = traced.telemetry.answers("m").begin()
    route = (Hop(PeerId("a"), BlockRange(0, 2), ()), Hop(PeerId("b"), BlockRange(2, 5), ()))
    now_s = MACHINE_CLOCK.now_s()
    spans.prefilled(route, 4, now_s - 1, (Passed(word, word, 1), Passed(1.0, 1.0, 1)))
    spans.prefilled(route, 4, now_s - 1, (Passed(1.0, 1.0, 1),))  # of another route
    spans.decoded(route, 1, (Passed(word, word, 1), Passed(1.0, 1.0, 1)))
    spans.end(Stats(), None)
    (whole,) = traced.spans("answer")
    for span in (*traced.of(whole, "prefill"), *traced.of(whole, "decode")):
        assert span.start_time is not None
        assert span.end_time is not None
        assert whole.start_time is not None
        assert whole.start_time - 2e9 <= span.start_time <= span.end_time <= time.time_ns() + 1e6
        assert math.isfinite(said(span, "inside_ms"))  # type: ignore[arg-type]
    assert len(traced.of(whole, "prefill")) == 2


@pytest.mark.parametrize("parent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 100_000])
async def test_a_parent_that_is_none_is_no_trouble(traced: Traced, parent: str) -> None:
    await traced.start()
    worker = traced.swarm.nodes["a0"].worker
    session = worker.sessions.open(
        Open(SessionId(1), MODEL, 0, 2, "float32", 16, 1, None, trace=parent), PeerId("c"), 0.0
    )
    worker._trace(session, parent)
    worker._end_trace(session.id)
    (stage,) = traced.spans("stage")
    assert stage.parent is None


def test_stages_that_know_no_traces_take_sessions_all_the_same() -> None:
    """And those that do take clients that know none: the field is one more in a map."""
    message = Open(SessionId(1), MODEL, 0, 2, "float32", 16, 1, None, trace="00-1")
    (frame,) = encode(message)
    fields = msgspec.msgpack.decode(bytes(frame)[8:])
    assert fields.pop("trace") == "00-1"
    assert decode_header(msgspec.msgpack.encode(fields)) == msgspec.structs.replace(message, trace="")
    assert decode_header(msgspec.msgpack.encode(fields | {"from_later": [1]})) == msgspec.structs.replace(
        message, trace=""
    )


def test_addresses_of_collectors() -> None:
    assert endpoint_of("http://127.0.0.1:4318") == "http://127.0.0.1:4318/v1/traces"
    assert endpoint_of("https://there/") == "https://there/v1/traces"
    assert endpoint_of("https://there/api/spans") == "https://there/api/spans"
    for wrong in ("there:4318", "ftp://there", "http://", ""):
        with pytest.raises(BadOption, match="collector"):
            endpoint_of(wrong)


def test_without_the_extra_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_telemetry("test", None) is None
    monkeypatch.delitem(sys.modules, "bsns.node.telemetry")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(BadOption, match=r"pip install 'bsns\[telemetry\]'"):
        open_telemetry("test", "http://127.0.0.1:4318")


async def test_spans_reach_a_collector() -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    telemetry = open_telemetry("bsns-test", f"http://127.0.0.1:{server.server_port}")
    assert telemetry is not None
    telemetry.answers("tiny").begin().end(Stats(), None)
    await telemetry.close()
    await asyncio.to_thread(server.shutdown)
    server.server_close()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    assert b"bsns-test" in body
    assert b"gen_ai.request.model" in body


async def test_a_collector_that_is_not_there_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPORT_S", 1.0)
    telemetry = Telemetry.to("test", "http://127.0.0.1:9")
    telemetry.answers("tiny").begin().end(Stats(), None)
    began_s = running_s()
    await telemetry.close()
    assert running_s() - began_s < 3
