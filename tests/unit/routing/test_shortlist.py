"""The shortlist: small swarms whole, of large ones enough for every block, the likeliest first."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId
from bsns.protocol.records import NodeRecord
from bsns.routing.shortlist import ASKED, HOLDERS, shortlist

BLOCKS = BlockRange(0, 8)
NODE = NodeRecord(
    *(PeerId("node"), (), ModelId("m"), "m", 8, 0, 2, "serving", "cpu", "float32", "torch", 1),
    *(4096, 4096, 0.01, 1, "0", 0.0, 1e12),
)


def swarm(count: int) -> list[NodeRecord]:
    rng = random.Random(count)
    return [
        msgspec.structs.replace(
            NODE,
            peer=PeerId(f"node-{number:04}"),
            start=2 * (number % 4),
            end=2 * (number % 4) + 2,
            block_time_s=rng.uniform(0.001, 0.01),
        )
        for number in range(count)
    ]


def chosen(
    records: list[NodeRecord],
    blocks: BlockRange = BLOCKS,
    *,
    avoid: Collection[PeerId] = (),
    sessions: Mapping[PeerId, int] | None = None,
    round_trips_s: Mapping[PeerId, float] | None = None,
    silent: Collection[PeerId] = (),
    **more: Any,
) -> list[NodeRecord]:
    return shortlist(
        records,
        blocks,
        needed_tokens=more.get("needed_tokens", 100),
        avoid=avoid,
        sessions=sessions or {},
        round_trips_s=round_trips_s or {},
        silent=silent,
        whim=more.get("whim", lambda peer: 0.0),
    )


def test_all_of_a_small_swarm() -> None:
    records = swarm(ASKED)
    assert chosen(records, avoid={records[0].peer}) == records


def test_of_a_large_one_the_fastest_holders_of_every_block() -> None:
    records = swarm(1000)
    kept = chosen(records)
    assert len(kept) == 4 * HOLDERS
    for start in range(0, 8, 2):
        here = sorted((r for r in records if r.start == start), key=lambda r: r.block_time_s)
        assert {r.peer for r in kept if r.start == start} == {r.peer for r in here[:HOLDERS]}
    assert [r.peer for r in kept] == sorted(r.peer for r in kept)


def test_of_a_range_its_holders_alone() -> None:
    assert {r.start for r in chosen(swarm(1000), BlockRange(3, 5))} == {2, 4}


def test_far_busy_full_avoided_and_silent_nodes_stand_back() -> None:
    records = swarm(1000)
    best = sorted(records, key=lambda record: record.block_time_s)[:5]
    far, busy, full, avoided, silent = (record.peer for record in best)
    records = [msgspec.structs.replace(r, cache_tokens_left=5) if r.peer == full else r for r in records]
    kept = chosen(
        records,
        avoid={avoided},
        sessions={busy: 1000},
        round_trips_s={far: 5.0} | {record.peer: 0.001 for record in best[5:] + records[:50]} | {far: 5.0},
        silent={silent},
    )
    assert not {far, busy, full, avoided, silent} & {record.peer for record in kept}


def test_silent_nodes_are_better_than_nobody() -> None:
    records = swarm(1000)
    only = {record.peer for record in records if record.start == 4}
    kept = chosen(records, silent=only)
    assert sum(record.peer in only for record in kept) == HOLDERS


def test_clients_do_not_all_ask_the_same() -> None:
    records = [msgspec.structs.replace(record, block_time_s=0.01) for record in swarm(1000)]

    def of(client: int) -> set[PeerId]:
        def whim(peer: PeerId) -> float:
            return random.Random(f"{client} {peer}").random()

        return {record.peer for record in chosen(records, whim=whim)}

    assert len(of(1) & of(2)) < len(of(1)) / 2
