"""What Prometheus reads of a node: figures of work that was really done."""

from __future__ import annotations

import asyncio
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path

from memory_swarm import MemorySwarm, StageShelf, answer, until
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from tiny_models import prompt

from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.node.metrics import node_metrics
from bsns.protocol.inference import Part
from bsns.worker.batching import Batch, Work
from bsns.worker.sessions import Session
from bsns.worker.tally import SECONDS, Distribution, Tally

CUTS = (0, 2, 5)
GREEDY = SamplingOptions(max_tokens=8)


class Read:
    """A node's figures by name and labels."""

    def __init__(self, swarm: MemorySwarm, name: str) -> None:
        worker = swarm.nodes[name].worker
        record = next(record for record in swarm.directory.shelf.values() if record.peer == PeerId(name))
        self._registry = CollectorRegistry()
        self._metrics = node_metrics(record, worker, moves=2, orchestrates=True)
        self._registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Sequence[Metric]:
        return self._metrics

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"bsns_node_{name}", labels)


async def test_an_answer_leaves_its_traces(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    await swarm.add_stages(shelf.stages(path, CUTS), block_count=CUTS[-1])
    ends = shelf.ends(path)
    hidden_bytes = 4 * ends.hidden_size
    client = swarm.client(ends, choose_codec=lambda sender, receiver: "int8" if receiver is None else "raw")
    await answer(client, prompt(20), GREEDY)
    await until(lambda: not len(swarm.nodes["node-0"].worker.sessions))
    first, last = Read(swarm, "node-0"), Read(swarm, "node-1")
    assert first("rows_total", kind="prefill") == 20
    assert first("rows_total", kind="decode") == 7  # the last token is not sent
    assert first("rows_total", kind="replay") == 0
    assert first("received_bytes_total", codec="raw") == 27 * hidden_bytes
    assert first("sent_bytes_total", codec="raw") == 27 * hidden_bytes
    assert last("sent_bytes_total", codec="raw") is None
    assert 0 < (last("sent_bytes_total", codec="int8") or 0) < 8 * hidden_bytes
    assert first("batch_sessions_count") == first("batch_seconds_count") == first("hop_seconds_count") == 8
    assert first("batch_sessions_bucket", le="1") == 8
    assert (first("batch_rows_bucket", le="16"), first("batch_rows_bucket", le="32")) == (7, 8)
    assert (first("batch_rows_sum"), first("waiting_steps")) == (27, 0)
    assert first("hop_seconds_sum") > first("batch_seconds_sum") > 0  # type: ignore[operator]
    assert (first("range_blocks", range="0:2", state="open"), first("moves_total")) == (2, 2)
    assert first("orchestrates") == 1
    assert (first("cache_tokens", state="reserved"), first("cache_tokens", state="left")) == (0, 4096)
    assert first("sessions", state="running") == first("sessions", state="parked") == 0
    assert first("info", peer="node-0", model="tiny", device="cpu", dtype="float32", executor="torch", quant="none",
                 kv="none", version="0") == 1  # fmt: skip


async def test_sessions_that_find_no_room_are_counted_by_reason(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    await swarm.add_stages(shelf.stages(path, CUTS[::2]), block_count=CUTS[-1], cache_tokens=64)
    hop = swarm.nodes["node-0"].hop
    client = swarm.client(shelf.ends(path), route=(hop,))
    stream = client.stream(prompt(20), SamplingOptions(max_tokens=30))
    await anext(stream)
    other = client.stream(prompt(20), GREEDY)
    waiting = asyncio.ensure_future(anext(other))
    await until(lambda: bool(swarm.nodes["node-0"].worker.tally.refused))
    read = Read(swarm, "node-0")
    assert (read("refused_sessions_total", reason="CacheFull") or 0) >= 1
    assert (read("cache_tokens", state="reserved"), read("sessions", state="running")) == (50, 1)
    await stream.aclose()
    await waiting
    await other.aclose()


async def test_what_a_spare_computes_in_a_lost_stages_place_counts_as_replay(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    stages = shelf.stages(path, CUTS)
    await swarm.add_stages([*stages, stages[1]], block_count=CUTS[-1])
    client = swarm.client(shelf.ends(path), route=tuple(swarm.nodes[f"node-{n}"].hop for n in range(2)))
    stream = client.stream(prompt(20), SamplingOptions(max_tokens=40))
    for _ in range(5):
        await anext(stream)
    swarm.network.kill(PeerId("node-1"))
    async for _ in stream:
        pass
    before, spare = Read(swarm, "node-0"), Read(swarm, "node-2")
    assert before("replays_total") == 1
    assert (spare("rows_total", kind="replay") or 0) >= 20
    assert (spare("rows_total", kind="decode") or 0) >= 30
    assert (before("sent_bytes_total", codec="raw") or 0) > (before("received_bytes_total", codec="raw") or 0)


def test_distributions_count_up_to_and_with_their_bounds() -> None:
    values = Distribution((1, 2))
    for value in (0.5, 1, 1.5, 2, 7):
        values.add(value)
    assert (values.counts, values.total) == ([2, 2, 1], 12)


def test_a_step_is_counted_within_five_microseconds() -> None:
    """All that a step of one session adds to a worker's tally."""
    held = BlockRange(0, 2)
    session = Session(SessionId(1), PeerId("c"), held, 64, 1, None, None, ())
    batch = Batch(held, [Work(session, Part(SessionId(1), 7, 1, 1, turn=3), b"", 0.0)])
    tally = Tally()

    def step() -> None:
        tally.received_bytes["raw"] += 2304
        tally.computed(batch, 0.002)
        tally.sent_bytes["raw"] += 2304
        tally.hop_s.add(0.0021)

    assert min(timeit.repeat(step, number=1000, repeat=20, timer=time.thread_time)) / 1000 < 5e-6
    assert tally.decode_rows == tally.steps == 20_000
    assert tally.batch_s.counts[SECONDS.index(0.0025)] == 20_000
