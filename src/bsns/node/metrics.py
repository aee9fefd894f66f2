"""What Prometheus reads of a node: its worker's figures as they stand, read on the event loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from bsns.node.server import Server
from bsns.protocol.records import NodeRecord
from bsns.worker.service import Worker
from bsns.worker.sessions import SessionTable
from bsns.worker.tally import Distribution


def server_metrics(server: Server) -> list[Metric]:
    """Of a node that serves."""
    return node_metrics(
        server.record,
        server.worker,
        moves=server.mover.moves if server.mover is not None else 0,
        orchestrates=server.orchestrator is not None and server.orchestrator.acts,
    )


def node_metrics(record: NodeRecord, worker: Worker, *, moves: int = 0, orchestrates: bool = False) -> list[Metric]:
    """Times in seconds. Counters count from the node's start."""
    return [
        *_what_it_is(record, worker.sessions),
        CounterMetricFamily("bsns_node_moves", "Ranges loaded because a plan said so", value=moves),
        GaugeMetricFamily("bsns_node_orchestrates", "Whether the node is the swarm's orchestrator", value=orchestrates),
        *_work(worker),
        *_room(worker),
        *_network(worker),
    ]


def _what_it_is(record: NodeRecord, sessions: SessionTable) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "bsns_node",
        "Who the node is, and what computes",
        value={
            "peer": record.peer,
            "model": record.model_name,
            "device": record.device,
            "dtype": record.dtype,
            "executor": record.executor,
            "quant": record.quant,
            "kv": record.kv,
            "version": record.version,
        },
    )
    held = GaugeMetricFamily(
        "bsns_node_range_blocks", "Blocks of each range held; an open one takes new sessions", labels=["range", "state"]
    )
    for blocks in sessions.ranges:
        held.add_metric([str(blocks), "open" if blocks in sessions.open_ranges else "draining"], len(blocks))
    yield held


def _work(worker: Worker) -> Iterator[Metric]:
    tally = worker.tally
    yield _counter(
        "bsns_node_rows",
        "Rows computed: of prompts, of answers with their guesses, and for a cache's sake alone",
        "kind",
        {"prefill": tally.prefill_rows, "decode": tally.decode_rows, "replay": tally.replay_rows},
    )
    yield _histogram("bsns_node_batch_sessions", "Sessions in a batch", tally.batch_sessions)
    yield _histogram("bsns_node_batch_rows", "Rows in a batch", tally.batch_rows)
    yield _histogram("bsns_node_batch_seconds", "Computing, of a batch", tally.batch_s)
    yield _histogram("bsns_node_hop_seconds", "A session's step inside the node, waiting included", tally.hop_s)
    yield GaugeMetricFamily("bsns_node_waiting_steps", "Steps that wait for a batch", value=worker.waiting_steps)
    yield GaugeMetricFamily(
        "bsns_node_block_seconds", "What a block takes for one row, by the median of late", value=worker.block_time_s
    )


def _room(worker: Worker) -> Iterator[Metric]:
    sessions, memory = worker.sessions, worker.memory
    yield _gauge(
        "bsns_node_sessions",
        "Sessions that run, and those kept between two answers",
        "state",
        {"running": len(sessions), "parked": sessions.parked},
    )
    yield GaugeMetricFamily(
        "bsns_node_waiting_clients", "Clients in line for room in the cache", value=sessions.waiting_clients
    )
    yield _gauge(
        "bsns_node_cache_tokens",
        "Tokens of cache: reserved by sessions that run, and left",
        "state",
        {"reserved": sessions.reserved, "left": sessions.cache_tokens_left},
    )
    yield _gauge(
        "bsns_node_memory_bytes",
        "What is in memory by reckoning; promised: keys, values and journals of all tokens of cache",
        "part",
        {
            "weights": memory.weight_bytes,
            "kv": memory.kv_bytes,
            "journals": memory.journal_bytes,
            "promised": memory.promised_bytes,
        },
    )
    yield _counter(
        "bsns_node_refused_sessions", "Sessions not admitted, by the error's code", "reason", worker.tally.refused
    )


def _network(worker: Worker) -> Iterator[Metric]:
    tally = worker.tally
    yield _counter("bsns_node_received_bytes", "Activations received, by codec", "codec", tally.received_bytes)
    yield _counter("bsns_node_sent_bytes", "Activations sent, by codec", "codec", tally.sent_bytes)
    yield CounterMetricFamily("bsns_node_replays", "Sessions replayed to a new next stage", value=tally.replays)
    yield GaugeMetricFamily(
        "bsns_node_replays_under_way", "Replays, and mirrors to spares, under way", value=worker.replays
    )


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(CounterMetricFamily(name, text, labels=[label]), values)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _labelled(GaugeMetricFamily(name, text, labels=[label]), values)


def _labelled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float]) -> Metric:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _histogram(name: str, text: str, values: Distribution) -> Metric:
    return HistogramMetricFamily(name, text, buckets=list(_cumulated(values)), sum_value=values.total)


def _cumulated(values: Distribution) -> Iterable[tuple[str, float]]:
    so_far = 0
    for bound, count in zip((*map(str, values.bounds), "+Inf"), values.counts, strict=True):
        so_far += count
        yield bound, so_far
