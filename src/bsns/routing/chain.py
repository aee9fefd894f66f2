"""Chains: the fastest way of one token through nodes that together hold every block."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import CacheFull, MissingBlocks
from bsns.core.ids import PeerId
from bsns.protocol.records import NodeRecord

DEFAULT_LATENCY_S = 0.001
"""One way to a peer nobody has measured."""

# Costs are whole picoseconds, so that equal ones compare equal whatever the order in which they were summed.
_PER_SECOND = 10**12
# How many cases to look at: beyond any real swarm's need, and a bound on what contrived records can cost.
_MAX_CASES = 200


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage of a route: a node and the blocks it computes, which may be fewer than it holds."""

    peer: PeerId
    blocks: BlockRange
    addresses: tuple[str, ...]


Route = tuple[Hop, ...]


def shortest_chain(
    records: Sequence[NodeRecord],
    block_count: int,
    *,
    round_trip_s: Mapping[PeerId, float],
    needed_tokens: int,
    avoid: Collection[PeerId] = (),
) -> Route:
    """The chain over blocks 0:block_count that takes one token least time, each node used once.

    Time is Σ blocks · block_time_s plus, for each hop, half the round trip to its peer. Ties go to fewer hops, then to
    more cache left on the fullest node. Nodes take part that serve, are not avoided and have room for
    `needed_tokens`. Exact, unless some 70 splits around nodes that a walk comes back to do not settle it; then the
    best chain found. Raises MissingBlocks, or CacheFull if only room is missing.
    """
    nodes = {r.peer: r for r in records if r.state == "serving" and r.peer not in avoid and _timed(r)}
    roomy = [r for r in nodes.values() if r.cache_tokens_left >= needed_tokens]
    if missing_blocks((r.blocks for r in roomy), block_count):
        raise _why_not(records, list(nodes.values()), roomy, block_count, needed_tokens)
    latencies = {r.peer: _picoseconds(_latency_s(round_trip_s.get(r.peer))) for r in roomy}
    # A walk may come back to a node it has left (it is faster for the blocks between), but a session is on a node
    # once. So the best walk is split into cases until one is a chain: around a block in such a gap, the node works
    # only before it, only after it, or is the one that computes it.
    whole = {r.peer: (r.start, min(r.end, block_count)) for r in roomy}
    held = {r.peer: r for r in roomy}
    order = count()
    cases = [_case(next(order), roomy, block_count, latencies, whole, {})]
    best = _straightened(cases[0][2])
    while cases:
        cost, number, walk, ranges, pinned = heapq.heappop(cases)
        hops = _hops(walk)
        best = min(best, _straightened(walk), key=lambda chain: _cost(chain, held, latencies))
        again = _revisited(hops)
        if again is None or number > _MAX_CASES or cost >= _cost(best, held, latencies):
            break
        peer, gap = again
        start, end = ranges[peer]
        for narrowed, fixed in (
            (ranges | {peer: (start, gap)}, pinned),
            (ranges | {peer: (gap + 1, end)}, pinned),
            (ranges, pinned | {gap: peer}),
        ):
            case = _case(next(order), roomy, block_count, latencies, narrowed, fixed)
            if case[2]:
                heapq.heappush(cases, case)
    return tuple(Hop(peer, blocks, held[peer].addresses) for peer, blocks in best)


_Chain = list[tuple[PeerId, BlockRange]]
_Cost = tuple[int, int, int]
"""Picoseconds, hops, and the least cache left on the way, negated: less is better in each."""
_Ranges = dict[PeerId, tuple[int, int]]
_Case = tuple[_Cost, int, list[PeerId], _Ranges, dict[int, PeerId]]


def _case(
    number: int,
    nodes: Sequence[NodeRecord],
    block_count: int,
    latencies: Mapping[PeerId, int],
    ranges: _Ranges,
    pinned: dict[int, PeerId],
) -> _Case:
    """The best walk within `ranges` and `pinned` (who must compute a block), as the peer of each block; [] if none."""
    # For each node that computed the block before: the best walk that ends there, as links back.
    reached: dict[PeerId, tuple[_Cost, object]] = {}
    done: tuple[_Cost, object] | None = ((0, 0, -(2**63)), None)
    for block in range(block_count):
        ahead: dict[PeerId, tuple[_Cost, object]] = {}
        for node in nodes:
            start, end = ranges[node.peer]
            if not start <= block < end or pinned.get(block, node.peer) != node.peer:
                continue
            work = _picoseconds(node.block_time_s)
            options: list[tuple[_Cost, object]] = []
            if done is not None:
                (spent, hops, room), back = done
                entered = (spent + latencies[node.peer] + work, hops + 1, max(room, -node.cache_tokens_left))
                options.append((entered, (node.peer, back)))
            if node.peer in reached:
                (spent, hops, room), back = reached[node.peer]
                options.append(((spent + work, hops, room), (node.peer, back)))
            if options:
                ahead[node.peer] = min(options, key=lambda option: option[0])
        reached = ahead
        done = min(ahead.values(), key=lambda option: option[0], default=None)
        if done is None:
            return (0, 0, 0), number, [], ranges, pinned
    assert done is not None
    return done[0], number, list(_unlinked(done[1]))[::-1], ranges, pinned


def _unlinked(link: object) -> Iterator[PeerId]:
    while isinstance(link, tuple):
        yield link[0]
        link = link[1]


def _hops(walk: Sequence[PeerId]) -> _Chain:
    """The hops of a walk given as the peer of each block."""
    hops: _Chain = []
    for peer, run in groupby(range(len(walk)), key=lambda block: walk[block]):
        blocks = list(run)
        hops.append((peer, BlockRange(blocks[0], blocks[-1] + 1)))
    return hops


def _straightened(walk: Sequence[PeerId]) -> _Chain:
    """A chain made of a walk: a node it comes back to keeps what lies between, which its range covers."""
    straight = list(walk)
    block = 0
    while block < len(straight):
        last = len(straight) - 1 - straight[::-1].index(straight[block])
        straight[block : last + 1] = [straight[block]] * (last + 1 - block)
        block = last + 1
    return _hops(straight)


def _cost(chain: _Chain, held: Mapping[PeerId, NodeRecord], latencies: Mapping[PeerId, int]) -> _Cost:
    spent = sum(latencies[peer] + len(blocks) * _picoseconds(held[peer].block_time_s) for peer, blocks in chain)
    return spent, len(chain), -min(held[peer].cache_tokens_left for peer, _ in chain)


def _revisited(hops: Sequence[tuple[PeerId, BlockRange]]) -> tuple[PeerId, int] | None:
    """A node that a walk comes back to, and the first block after it first left."""
    left: dict[PeerId, int] = {}
    for peer, blocks in hops:
        if peer in left:
            return peer, left[peer]
        left[peer] = blocks.end
    return None


def _timed(record: NodeRecord) -> bool:
    return math.isfinite(record.block_time_s) and record.block_time_s >= 0


def _latency_s(round_trip_s: float | None) -> float:
    return DEFAULT_LATENCY_S if round_trip_s is None else round_trip_s / 2


def _picoseconds(time_s: float) -> int:
    return round(time_s * _PER_SECOND)


def _why_not(
    records: Sequence[NodeRecord],
    nodes: Sequence[NodeRecord],
    roomy: Sequence[NodeRecord],
    block_count: int,
    needed_tokens: int,
) -> MissingBlocks | CacheFull:
    gaps = missing_blocks((r.blocks for r in nodes), block_count)
    if gaps:
        absent = [r for r in records if r not in nodes and any(_meet(r.blocks, gap) for gap in gaps)]
        others = "; ".join(f"{r.peer} has {r.blocks} and is {_standing(r)}" for r in absent)
        return MissingBlocks(
            f"no node serves blocks {', '.join(map(str, gaps))}" + (f" ({others})" if others else "; add a node")
        )
    gaps = missing_blocks((r.blocks for r in roomy), block_count)
    left = ", ".join(
        f"{r.cache_tokens_left} left on {r.peer} ({r.blocks})"
        for r in nodes
        if r not in roomy and any(_meet(r.blocks, gap) for gap in gaps)
    )
    return CacheFull(f"the session needs {needed_tokens} tokens of cache on blocks {', '.join(map(str, gaps))}: {left}")


def _meet(one: BlockRange, other: BlockRange) -> bool:
    return one.start < other.end and other.start < one.end


def _standing(record: NodeRecord) -> str:
    return record.state if record.state != "serving" else "set aside"
