"""What Prometheus reads of a gateway."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bsns.gateway.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)


class Metrics:
    """Counted from the gateway's start; times in seconds."""

    def __init__(self, engine: Engine) -> None:
        """The engine is asked whenever somebody reads."""
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "bsns_gateway_requests", "HTTP requests answered", ["endpoint", "status"], registry=registry
        )
        self.tokens = Counter(
            "bsns_gateway_tokens", "Tokens of prompts (in) and answers (out)", ["way"], registry=registry
        )
        self.cached_tokens = Counter(
            "bsns_gateway_cached_prompt_tokens",
            "Tokens of prompts that the swarm had kept, of each choice",
            registry=registry,
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
        registry.register(_Swarm(engine))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Swarm:
    """What the swarm's client counts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        tally = self._engine.tally
        yield CounterMetricFamily(
            "bsns_gateway_repairs", "Lost stages replaced under answers", value=self._engine.repairs
        )
        yield GaugeMetricFamily(
            "bsns_gateway_answers_waiting", "Answers that wait for a route, or for room", value=tally.waiting
        )
        yield CounterMetricFamily(
            "bsns_gateway_guessed_tokens", "Tokens guessed and sent along to be checked", value=tally.guesses
        )
        yield CounterMetricFamily("bsns_gateway_right_guesses", "Guesses that were right", value=tally.right)
        for name, text, values in (
            ("bsns_gateway_sent_bytes", "Activations sent to nodes, by codec", tally.sent_bytes),
            ("bsns_gateway_received_bytes", "Activations received from nodes, by codec", tally.received_bytes),
        ):
            family = CounterMetricFamily(name, text, labels=["codec"])
            for codec, value in values.items():
                family.add_metric([codec], value)
            yield family
