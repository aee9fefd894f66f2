"""A real swarm measures itself: its records gain links, and `bsns doctor` shows them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from processes import Running, bsns, running, swarm, tiny

from bsns.cli.doctor import as_dict
from bsns.core.snapshot import ModelShape
from bsns.model.shapes import shape_of
from bsns.model.source import resolve
from bsns.node.peer import Peer
from bsns.node.snapshots import look, observe_snapshot
from bsns.protocol.records import NodeRecord
from bsns.swarm.doctor import findings

__all__ = ["swarm", "tiny"]

DEADLINE_S = 40.0
"""Seconds of a loaded machine: an idle one takes three or four."""


async def records_when(invite: str, ready: Callable[[list[NodeRecord]], Any]) -> list[NodeRecord]:
    """The swarm's records once they are as wanted."""
    peer = await Peer.join(invite, None)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not ready(records := await peer.directory.records()):  # noqa: ASYNC110  records change unannounced
                await asyncio.sleep(0.2)
            return records
    finally:
        await peer.close()


def all_linked(count: int) -> Callable[[list[NodeRecord]], bool]:
    return lambda records: len(records) == count and all(len(record.links) == count - 1 for record in records)


def examined(invite: str) -> dict[str, Any]:
    """What `bsns doctor --json` prints, asked from this process, which has the libraries loaded."""
    sight = asyncio.run(look(invite))
    return as_dict(sight, findings(sight.records, sight.snapshot, time.time(), silent=sight.silent))


def test_nodes_measure_each_other_and_the_doctor_shows_it(swarm: tuple[Running, str]) -> None:
    _, invite = swarm
    records = asyncio.run(records_when(invite, all_linked(2)))
    one, other = records
    for record, peer in ((one, other.peer), (other, one.peer)):
        assert 0 < record.prefill_time_s < record.block_time_s < 1
        assert record.memory_bytes > 0
        (link,) = record.links
        assert link.peer == peer
        assert 0 < link.round_trip_s < 1
        assert 1e5 < link.bytes_per_s < 1e12

    value = examined(invite)
    assert {node["id"] for node in value["nodes"]} == {one.peer, other.peer}
    assert all(node["prefill_time_ms"] > 0 and node["error"] is None for node in value["nodes"])
    assert {frozenset((link["a"], link["b"])) for link in value["links"]} == {
        frozenset((one.peer, other.peer)),
        frozenset(("client", one.peer)),
        frozenset(("client", other.peer)),
    }
    assert not [finding for finding in value["findings"] if finding["grave"]]
    assert asyncio.run(observe_snapshot(invite, measure_client=False)).client == {}

    said = bsns("doctor", "--join", invite)
    assert said.returncode == 0
    for words in (one.peer[-8:], other.peer[-8:], "B/s", "this machine", "ago"):
        assert words in said.stdout


def test_a_newcomer_is_measured_and_the_dead_are_told(tiny: str, swarm: tuple[Running, str]) -> None:
    _, invite = swarm
    with running("serve", tiny, "--join", invite, "--blocks", "0:4", "--json") as newcomer:
        newcomer.event("serving")
        asyncio.run(records_when(invite, all_linked(3)))
        newcomer.kill()
        value = examined(invite)
    assert "no answer" in {finding["kind"] for finding in value["findings"]}


def test_the_shape_of_a_model_on_this_disk(tiny: str) -> None:
    source = resolve(tiny)
    shape = shape_of(source, "bfloat16")
    assert isinstance(shape, ModelShape)
    assert shape.block_count == source.block_count == 4
    assert sum(shape.block_bytes) == source.weight_bytes - source.end_bytes  # stored in bfloat16 as well
    assert shape_of(source, "float32").block_bytes[0] == 2 * shape.block_bytes[0]
    assert shape.hidden_bytes == 64 * 2
    assert shape.kv_bytes_per_token_per_block == 2 * 2 * 16 * 2
