"""`--otlp`: what a client and its nodes trace is one trace, at a real collector's address."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from processes import bsns, running, tiny, until

__all__ = ["tiny"]


class Collector:
    """Takes spans over HTTP, by the services that send them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        taken = self.spans

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in told.resource_spans:
                    about = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        taken.extend((about["service.name"], span) for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def named(self, service: str, name: str) -> list[Span]:
        return [span for who, span in list(self.spans) if who == service and span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_a_client_and_a_node_tell_one_trace(tiny: str, collector: Collector) -> None:
    with running("serve", tiny, "--threads", "1", "--otlp", collector.url, "--json") as node:
        invite = node.event("serving")["invite"]
        args = ("--raw", "--max-tokens", "8", "--temperature", "1", "--json", "--otlp", collector.url)
        ended = bsns("generate", tiny, "--join", invite, "--prompt", "Hello", *args)
        assert (ended.returncode, ended.stderr) == (0, "")
        (answer,) = collector.named("bsns-generate", "answer")
        until(lambda: collector.named("bsns-node", "stage"), 15, "the node's spans")
    (stage,) = collector.named("bsns-node", "stage")
    assert (stage.trace_id, stage.parent_span_id) == (answer.trace_id, answer.span_id)
    assert {span.trace_id for _, span in collector.spans} == {answer.trace_id}
    assert {name for _, name in ((who, span.name) for who, span in collector.spans)} >= {"prefill", "answer", "stage"}
