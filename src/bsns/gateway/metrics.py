"""What Prometheus reads of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)


class Metrics:
    """Counted from the gateway's start; times in seconds."""

    def __init__(self, repairs: Callable[[], int]) -> None:
        """`repairs` is asked whenever somebody reads."""
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "bsns_gateway_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self.tokens = Counter(
            "bsns_gateway_tokens", "Tokens of prompts (in) and answers (out)", ["way"], registry=registry
        )
        self.first_token_s = Histogram(
            "bsns_gateway_time_to_first_token_seconds",
            "From asking the swarm for an answer to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.next_token_s = Histogram(
            "bsns_gateway_inter_token_seconds",
            "Between two tokens of an answer, as its reader takes them",
            buckets=_SECONDS,
            registry=registry,
        )
        self.under_way = Gauge("bsns_gateway_answers_under_way", "Answers under way", registry=registry)
        registry.register(_Repairs(repairs))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Repairs:
    """A counter that somebody else keeps."""

    def __init__(self, made: Callable[[], int]) -> None:
        self._made = made

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("bsns_gateway_repairs", "Lost stages replaced under answers", value=self._made())
