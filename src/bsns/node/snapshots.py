"""Snapshots of a running swarm: its records, what its nodes measured of each other, and the ways of whoever looks."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bsns.client.links import Links
from bsns.core.errors import BsnsError
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, Snapshot
from bsns.node.peer import Peer
from bsns.node.prober import measure
from bsns.node.view import View
from bsns.protocol.inference import Description
from bsns.protocol.records import NodeRecord
from bsns.swarm.probing import LinkEstimator
from bsns.swarm.snapshot import snapshot

AT_ONCE = 16
"""Nodes asked at the same time."""
BANDWIDTH_TIME_S = 5.0
"""How long bandwidths are measured, a node at a time; those that are left then are only pinged."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A swarm as it was seen: all records, also of nodes that did not answer, which the snapshot leaves out."""

    records: tuple[NodeRecord, ...]
    snapshot: Snapshot
    answers: Mapping[PeerId, Description]
    """The present numbers of those who answered."""
    silent: Mapping[PeerId, str]
    """Who did not answer, and what happened instead."""


async def observe_snapshot(invite: str, *, model: ModelId | None = None, measure_client: bool = True) -> Snapshot:
    """The swarm as it is now: every node, or those of one model. Raises as joining does.

    With `measure_client` also the caller's own ways to the nodes; a node that does not answer is left out then, which
    `assumptions` says.
    """
    return (await look(invite, model=model, measure_client=measure_client)).snapshot


async def look(invite: str, *, model: ModelId | None = None, measure_client: bool = True) -> Sight:
    """Join as a client, read the records, ask every node, and leave. Raises as joining does."""
    peer = await Peer.join(invite, None)
    links = Links(peer.dial, lambda *_: None, lambda *_: None, lambda *_: None)
    try:
        records = await View(peer.directory, model).records()
        return await _ask(records, links) if measure_client else _sight(records, {}, {}, {})
    finally:
        await links.close()
        await peer.close()


async def _ask(records: list[NodeRecord], links: Links) -> Sight:
    """What each answers, and how far it is: one after the other, so that they do not stand in each other's way."""
    answers: dict[PeerId, Description] = {}
    silent: dict[PeerId, str] = {}
    client: dict[PeerId, Link] = {}
    gate = asyncio.Semaphore(AT_ONCE)

    async def greet(record: NodeRecord) -> None:
        if record.state == "joining":  # it does not listen yet
            return
        async with gate:
            try:
                answers[record.peer] = await (await links.to(record.peer, record.addresses)).describe()
            except BsnsError as error:
                silent[record.peer] = error.message

    async def time_it(record: NodeRecord, *, bandwidth: bool) -> None:
        estimate = LinkEstimator(0.0)
        async with gate:
            try:
                found = await measure(await links.to(record.peer, record.addresses), bandwidth=bandwidth)
            except BsnsError as error:
                silent[record.peer] = error.message
                return
        estimate.answered(found.round_trips_s, found.bytes_per_s, 0.0)
        link = estimate.link(0.0)
        if link is not None:
            client[record.peer] = link

    await asyncio.gather(*map(greet, records))
    left = [record for record in records if record.peer in answers]
    end_s = time.monotonic() + BANDWIDTH_TIME_S
    while left and time.monotonic() < end_s:
        await time_it(left.pop(0), bandwidth=True)
    await asyncio.gather(*(time_it(record, bandwidth=False) for record in left))
    return _sight(records, client, answers, silent)


def _sight(
    records: list[NodeRecord],
    client: Mapping[PeerId, Link],
    answers: Mapping[PeerId, Description],
    silent: Mapping[PeerId, str],
) -> Sight:
    seen = snapshot([record for record in records if record.peer not in silent], time.time(), client)
    notes = tuple(f"node {peer} did not answer and is left out" for peer in sorted(silent))
    return Sight(tuple(records), dataclasses.replace(seen, assumptions=seen.assumptions + notes), answers, silent)
