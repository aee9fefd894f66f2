"""Traces for OpenTelemetry: a span for each answer, and below it what its hops did.

Each step of an answer passes every stage: a span for each of those would be a flood. The first chunks of a prompt have
a span for each hop; what follows is one span for each hop, with sums.

A client knows of a hop what the node says: how long the step was inside. When that began it reckons from when the step
left and came back, the ways between taken to be equally long. A node that traces knows its own times.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

import bsns
from bsns.client.pieces import Stats
from bsns.client.tracing import Hops
from bsns.core.errors import BadOption, BsnsError
from bsns.core.ids import PeerId
from bsns.routing.chain import Route
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.worker.batching import Batch, Work
from bsns.worker.sessions import Session

MOST_CHUNKS = 16
"""Chunks of a prompt that have spans of their own."""
EXPORT_S = 5.0
"""What sending spans may take; at the end those that are left are given up then."""
TRACES = "/v1/traces"


def endpoint_of(url: str) -> str:
    """Where a collector takes traces: as OpenTelemetry has it, below an address without a path. Raises BadOption."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise BadOption(f"{url!r} is no collector's address; write for example http://127.0.0.1:4318")
    return url if parts.path.strip("/") else parts._replace(path=TRACES).geturl()


class Telemetry:
    """Where this process's spans go. Sampling is as OTEL_TRACES_SAMPLER says: all, if it says nothing."""

    def __init__(self, service: str, processor: SpanProcessor, clock: Clock = MACHINE_CLOCK) -> None:
        about: Mapping[str, AttributeValue] = {"service.name": service, "service.version": bsns.__version__}
        # without a hand on the process's end: whoever made this closes it
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._spans = Spans(self._provider, clock)

    @classmethod
    def to(cls, service: str, url: str) -> Telemetry:
        """To a collector that speaks OTLP over HTTP. Raises BadOption."""
        return cls(service, BatchSpanProcessor(OTLPSpanExporter(endpoint_of(url), timeout=EXPORT_S)))

    def answers(self, model: str) -> AnswerTracer:
        """For a client (client.tracing)."""
        return AnswerTracer(self._spans, model)

    def stages(self, me: PeerId) -> SessionTracer:
        """For a worker (worker.tracing)."""
        return SessionTracer(self._spans, me)

    async def close(self) -> None:
        """Send what is left, or give it up."""
        closing = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait((closing,), timeout=EXPORT_S)


class Spans:
    """Makes spans whose times are of a clock that began some time ago."""

    def __init__(self, provider: TracerProvider, clock: Clock) -> None:
        self.tracer = provider.get_tracer("bsns", bsns.__version__)
        self.now_s = clock.now_s
        self._began_ns = int((clock.unix_s() - clock.now_s()) * 1e9)

    def ns(self, at_s: float) -> int:
        """In nanoseconds of Unix time."""
        return self._began_ns + int(at_s * 1e9)

    def child(
        self, parent: Span, name: str, start_s: float, end_s: float, attributes: Mapping[str, AttributeValue]
    ) -> None:
        span = self.tracer.start_span(
            name, set_span_in_context(parent), SpanKind.CLIENT, attributes, start_time=self.ns(start_s)
        )
        span.end(self.ns(end_s))


@dataclass(slots=True)
class _Sum:
    """What a hop did over many steps."""

    start_s: float
    end_s: float = 0.0
    steps: int = 0
    rows: int = 0
    inside_ms: float = 0.0
    compute_ms: float = 0.0

    def add(self, end_s: float, rows: int, inside_ms: float, compute_ms: float) -> None:
        self.end_s = end_s
        self.steps += 1
        self.rows += rows
        self.inside_ms += inside_ms
        self.compute_ms += compute_ms

    def attributes(self) -> dict[str, AttributeValue]:
        return {
            "bsns.steps": self.steps,
            "bsns.rows": self.rows,
            "bsns.inside_ms": self.inside_ms,
            "bsns.compute_ms": self.compute_ms,
        }


class AnswerTracer:
    """See client.tracing.Tracer."""

    def __init__(self, spans: Spans, model: str) -> None:
        self._spans = spans
        self._model = model

    def begin(self) -> TracedAnswer:
        return TracedAnswer(self._spans, self._model)


class TracedAnswer:
    """See client.tracing.AnswerTrace."""

    def __init__(self, spans: Spans, model: str) -> None:
        self._spans = spans
        about: dict[str, AttributeValue] = {"gen_ai.request.model": model}
        if (request := structlog.contextvars.get_contextvars().get("request_id")) is not None:
            about["bsns.request_id"] = str(request)
        self._span = spans.tracer.start_span("answer", attributes=about, start_time=spans.ns(spans.now_s()))
        self._route: Route = ()
        self._chunks = 0
        self._sums: dict[tuple[str, PeerId, str], _Sum] = {}

    @property
    def parent(self) -> str:
        return _traceparent(self._span)

    def prefilled(self, route: Route, rows: int, sent_s: float, hops: Hops) -> None:
        self._follow(route)
        self._chunks += 1
        now_s = self._spans.now_s()
        for hop, (start_s, end_s, compute_ms) in zip(route, _placed(route, sent_s, now_s, hops), strict=False):
            inside_ms = (end_s - start_s) * 1e3
            if self._chunks > MOST_CHUNKS:
                key = ("prefill", hop.peer, str(hop.blocks))
                self._sums.setdefault(key, _Sum(start_s)).add(end_s, rows, inside_ms, compute_ms)
                continue
            about: dict[str, AttributeValue] = {
                "bsns.peer": hop.peer,
                "bsns.blocks": str(hop.blocks),
                "bsns.rows": rows,
                "bsns.inside_ms": inside_ms,
                "bsns.compute_ms": compute_ms,
            }
            self._spans.child(self._span, "prefill", start_s, end_s, about)

    def decoded(self, route: Route, rows: int, hops: Hops) -> None:
        self._follow(route)
        now_s = self._spans.now_s()
        if len(hops) != len(route):
            return
        for hop, (inside_ms, compute_ms, _) in zip(route, hops, strict=True):
            inside_s = _sane(inside_ms / 1e3, math.inf)
            key = ("decode", hop.peer, str(hop.blocks))
            self._sums.setdefault(key, _Sum(now_s)).add(now_s, rows, inside_s * 1e3, _sane(compute_ms, math.inf))

    def end(self, stats: Stats, error: BaseException | None) -> None:
        for (name, peer, blocks), done in self._sums.items():
            about = {"bsns.peer": peer, "bsns.blocks": blocks} | done.attributes()
            self._spans.child(self._span, name, done.start_s, done.end_s, about)
        span = self._span
        span.set_attributes(
            {
                "bsns.session": stats.session,
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.output_tokens": stats.tokens,
                "bsns.cached_tokens": stats.cached_tokens,
                "bsns.first_token_ms": stats.ttft_ms,
                "bsns.route": _names(stats.route),
            }
        )
        if isinstance(error, BsnsError):
            span.set_status(Status(StatusCode.ERROR, f"{error.code}: {error.message}"))
        elif isinstance(error, Exception):
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        elif error is not None:  # its reader went
            span.set_attribute("bsns.closed", True)
        span.end(self._spans.ns(self._spans.now_s()))

    def _follow(self, route: Route) -> None:
        """Note that others compute the answer now."""
        if self._route and route != self._route:
            now_ns = self._spans.ns(self._spans.now_s())
            self._span.add_event("rerouted", {"bsns.route": _names(route)}, now_ns)
        self._route = route


class SessionTracer:
    """See worker.tracing.StageTracer."""

    def __init__(self, spans: Spans, me: PeerId) -> None:
        self._spans = spans
        self._me = me

    def begin(self, session: Session, client: PeerId, parent: str) -> TracedSession:
        return TracedSession(self._spans, self._me, session, client, parent)


class TracedSession:
    """See worker.tracing.StageTrace."""

    def __init__(self, spans: Spans, me: PeerId, session: Session, client: PeerId, parent: str) -> None:
        self._spans = spans
        self._chunks = 0
        self._sums: dict[str, _Sum] = {}
        about: dict[str, AttributeValue] = {
            "bsns.peer": me,
            "bsns.client": client,
            "bsns.session": str(session.id),
            "bsns.blocks": str(session.blocks),
        }
        self._span = spans.tracer.start_span(
            "stage",
            TraceContextTextMapPropagator().extract({"traceparent": parent}),
            SpanKind.SERVER,
            about,
            start_time=spans.ns(spans.now_s()),
        )

    def step(self, batch: Batch, work: Work, finished_s: float) -> None:
        rows = work.part.rows
        name = "decode" if work.part.turn else "prefill"
        inside_ms, compute_ms = (finished_s - work.arrived_s) * 1e3, (finished_s - work.started_s) * 1e3
        self._chunks += name == "prefill"
        if name == "prefill" and self._chunks <= MOST_CHUNKS:
            about: dict[str, AttributeValue] = {
                "bsns.rows": rows,
                "bsns.batch_sessions": len(batch.works),
                "bsns.inside_ms": inside_ms,
                "bsns.compute_ms": compute_ms,
            }
            self._spans.child(self._span, name, work.arrived_s, finished_s, about)
        else:
            summed = self._sums.setdefault(name, _Sum(work.arrived_s))
            summed.add(finished_s, rows, inside_ms, compute_ms)

    def end(self) -> None:
        for name, done in self._sums.items():
            self._spans.child(self._span, name, done.start_s, done.end_s, done.attributes())
        self._span.end(self._spans.ns(self._spans.now_s()))


def _placed(route: Route, sent_s: float, came_s: float, hops: Hops) -> Iterator[tuple[float, float, float]]:
    """When each hop began and ended, and milliseconds of computing; nothing where the hops are not the route's."""
    if len(hops) != len(route):
        return
    left_s = max(0.0, came_s - sent_s)
    insides_s: list[float] = []
    for inside_ms, *_ in hops:
        insides_s.append(_sane(inside_ms / 1e3, left_s))
        left_s -= insides_s[-1]
    way_s = left_s / (len(hops) + 1)
    at_s = sent_s
    for inside_s, (_, compute_ms, _) in zip(insides_s, hops, strict=True):
        at_s += way_s
        yield at_s, at_s + inside_s, _sane(compute_ms, inside_s * 1e3)
        at_s += inside_s


def _sane(said: float, most: float) -> float:
    """A duration in a stranger's words."""
    return min(max(said, 0.0), most) if math.isfinite(said) else 0.0


def _names(route: Route) -> list[str]:
    return [f"{hop.peer} {hop.blocks}" for hop in route]


def _traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
