"""A client's view of the swarm."""

from __future__ import annotations

import time

import msgspec

from bsns.core.ids import ModelId, PeerId
from bsns.node.view import View
from bsns.protocol.records import NodeRecord
from bsns.swarm.directory import MemoryDirectory

HONEST = NodeRecord(
    peer=PeerId("honest"),
    addresses=(),
    model=ModelId("m"),
    model_name="m",
    block_count=4,
    start=0,
    end=4,
    state="serving",
    device="cpu",
    dtype="float32",
    executor="torch",
    threads=1,
    cache_tokens=100,
    cache_tokens_left=100,
    block_time_s=0.001,
    rss_bytes=1,
    version="0",
    started_s=0.0,
    expires_s=time.time() + 3600,
)


async def test_a_node_that_cuts_the_model_short_is_not_seen() -> None:
    """Its peer id sorts first: who believed its number of blocks would compute one block and call it the model."""
    directory = MemoryDirectory()
    liar = msgspec.structs.replace(HONEST, peer=PeerId("a liar"), block_count=1, end=1)
    for record in (HONEST, liar):
        await directory.publish(record)
    assert await View(directory, HONEST.model, None, 4).records() == [HONEST]
    assert await View(directory, HONEST.model, "float32", 4).records() == [HONEST]
    assert await View(directory).records() == [liar, HONEST]
