"""Chains: the best way of one token through nodes that together hold every block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import msgspec
import numpy as np

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BadOption, CacheFull, MissingBlocks
from bsns.core.ids import PeerId
from bsns.core.snapshot import NodeView, Snapshot
from bsns.planning.problem import Chain, ChainProblem, Floats
from bsns.planning.selection import Traits, Weights, held_reach, select, weighted_ways
from bsns.planning.walks import Cost, Ints, Ways
from bsns.protocol.inference import MAX_DEPTH
from bsns.protocol.records import NodeRecord
from bsns.routing.load import slowdown
from bsns.routing.widest import fastest_chain, widest_chain

DEFAULT_LATENCY_S = 0.001
"""One way to a peer nobody has measured."""
SILENT_S = 5.0
"""What is added to every way to a peer that did not answer: far away, but not forgotten."""

# Costs are whole picoseconds, so that equal ones compare equal whatever the order in which they were summed.
_PER_SECOND = 10**12

Aim = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage of a route: a node and the blocks it computes, which may be fewer than it holds."""

    peer: PeerId
    blocks: BlockRange
    addresses: tuple[str, ...]
    block_time_s: float = field(default=0.0, compare=False)
    """What the node says that a block takes it for a token; 0 where that is not known."""
    machine: bytes = field(default=b"", compare=False)
    share: float = field(default=1.0, compare=False)
    """What it computes with, and how much of that it uses (protocol.records.NodeRecord)."""

    @property
    def says_ms(self) -> float:
        """What a token takes on its blocks by that."""
        return 1e3 * self.block_time_s * len(self.blocks)


Route = tuple[Hop, ...]


def at_once(route: Route) -> int:
    """How many stages of a route can compute at the same time: those that share a machine only as many as it has room
    for."""
    shares: defaultdict[bytes, list[float]] = defaultdict(list)
    for hop in route:
        shares[hop.machine or hop.peer.encode()].append(hop.share)
    return max(1, round(sum(len(those) / max(1.0, sum(those)) for those in shares.values())))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a route is chosen by: `weights` if there are any, else the exact chain of least latency or most throughput.

    Raises BadOption for an aim that there is not, or for both.
    """

    aim: Aim = "latency"
    weights: Weights | None = None
    hop_bytes: int = 0
    """What one token's activations take on a way."""

    def __post_init__(self) -> None:
        if self.aim not in ("latency", "throughput"):
            raise BadOption(f"there is no objective {self.aim!r}; use latency or throughput")
        if self.weights is not None and self.aim != "latency":
            raise BadOption("give either weights or an objective: weights say themselves what is wanted")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known beside the records: measured ways, open sessions of each node, and who did not answer."""

    snapshot: Snapshot
    sessions: Mapping[PeerId, int] = field(default_factory=lambda: MappingProxyType({}))
    silent: Collection[PeerId] = ()


def best_chain(
    records: Sequence[NodeRecord],
    block_count: int,
    known: Knowledge,
    *,
    needed_tokens: int,
    avoid: Collection[PeerId] = (),
    wish: Wish | None = None,
) -> Route:
    """The chain over blocks 0:block_count that serves the wish best, each node used once, at most MAX_DEPTH of them.

    A stage takes Σ blocks · block_time_s, more on a busy node (routing.load), and the way in; then there is the way
    back to the client. Ways are measured ones; where nodes have not measured theirs, half the client's round trip to
    the one that receives, or DEFAULT_LATENCY_S. Ties of latency go to fewer hops, then to more cache left on the
    fullest node. Nodes take part that serve, are not avoided, have room for `needed_tokens`, and are attested if the
    weights say so. Exact, unless some 70 splits around nodes that a walk comes back to do not settle it; then the best
    chain found. Raises MissingBlocks, or CacheFull if only room is missing.
    """
    wish = wish or Wish()
    views = {node.peer: node for node in known.snapshot.nodes}
    only_attested = wish.weights is not None and wish.weights.attested_only
    nodes = [
        r
        for r in {r.peer: r for r in records}.values()
        if r.state == "serving"
        and r.peer not in avoid
        and _timed(r)
        and not (only_attested and not (r.peer in views and views[r.peer].attested))
    ]
    roomy = [r for r in nodes if r.cache_tokens_left >= needed_tokens]
    if missing_blocks((blocks for r in roomy for blocks in r.ranges), block_count):
        raise _why_not(records, nodes, roomy, block_count, needed_tokens, only_attested)
    problem = _problem(roomy, block_count, known, wish.hop_bytes)
    reach_NL = held_reach([r.ranges for r in roomy], block_count)
    if wish.weights is not None:
        chosen = [views.get(r.peer) or _unseen(r) for r in roomy]
        traits = Traits.of(chosen)
        chain = select(problem, wish.weights, traits=traits, reach_NL=reach_NL)
        if chain is None or len(chain) > MAX_DEPTH:  # the picks led astray
            ways = weighted_ways(problem, wish.weights, traits, reach_NL)
            chain = _chain(fastest_chain(ways, MAX_DEPTH))
    else:
        ways = _ways(problem, reach_NL, [r.cache_tokens_left for r in roomy])
        chain = _chain((fastest_chain if wish.aim == "latency" else widest_chain)(ways, MAX_DEPTH))
    if chain is None:
        raise MissingBlocks(
            f"all blocks are served, but no chain covers 0:{block_count} with each node used once and at most "
            f"{MAX_DEPTH} nodes; add a node"
        )
    return tuple(
        Hop(
            roomy[n].peer,
            BlockRange(start, end),
            roomy[n].addresses,
            roomy[n].block_time_s,
            roomy[n].machine,
            roomy[n].share,
        )
        for n, start, end in chain
    )


def best_detour(
    records: Sequence[NodeRecord],
    blocks: BlockRange,
    known: Knowledge,
    *,
    needed_tokens: int,
    avoid: Collection[PeerId] = (),
    wish: Wish | None = None,
) -> Route:
    """As `best_chain`, over a range of the blocks. Raises MissingBlocks, CacheFull."""
    there: list[NodeRecord] = []
    for record in records:
        ranges = [
            (max(held.start, blocks.start) - blocks.start, min(held.end, blocks.end) - blocks.start)
            for held in record.ranges
            if held.start < blocks.end and blocks.start < held.end
        ]
        if ranges:
            (start, end), *others = ranges
            there.append(
                msgspec.structs.replace(record, start=start, end=end, others=tuple(others), block_count=len(blocks))
            )
    try:
        route = best_chain(there, len(blocks), known, needed_tokens=needed_tokens, avoid=avoid, wish=wish)
    except MissingBlocks:
        raise MissingBlocks(f"nobody else can serve blocks {blocks}") from None
    except CacheFull:
        raise CacheFull(f"nobody else has room for {needed_tokens} tokens of cache on blocks {blocks}") from None
    return tuple(
        replace(hop, blocks=BlockRange(hop.blocks.start + blocks.start, hop.blocks.end + blocks.start)) for hop in route
    )


def _chain(found: tuple[Cost, Chain] | None) -> Chain | None:
    return found and found[1]


def _problem(nodes: Sequence[NodeRecord], block_count: int, known: Knowledge, hop_bytes: int) -> ChainProblem:
    """The nodes and the ways between them, in seconds; nothing is said of memory, as they hold their blocks already."""
    client = {peer: link.transfer_s(hop_bytes) for peer, link in known.snapshot.client.items()}
    ends_N = np.array([client.get(r.peer, DEFAULT_LATENCY_S) for r in nodes])
    hop_NN = np.tile(ends_N, (len(nodes), 1))
    index = {r.peer: number for number, r in enumerate(nodes)}
    for (one, other), link in known.snapshot.links.items():
        a, b = index.get(one), index.get(other)
        if a is not None and b is not None:
            hop_NN[a, b] = hop_NN[b, a] = link.transfer_s(hop_bytes)
    late_N = np.array([SILENT_S if r.peer in known.silent else 0.0 for r in nodes])
    return ChainProblem(
        work_L=np.ones(block_count),
        bytes_L=np.zeros(block_count),
        time_N=np.array([r.block_time_s * slowdown(known.sessions.get(r.peer, 0)) for r in nodes]),
        memory_N=np.full(len(nodes), math.inf),
        hop_NN=hop_NN + late_N,
        entry_N=ends_N + late_N,
        exit_N=ends_N,
        client_s=0.0,
        peers=tuple(r.peer for r in nodes),
    )


def _ways(problem: ChainProblem, reach_NL: Ints, cache_left: Sequence[int]) -> Ways:
    return Ways(
        np.repeat(_picoseconds(problem.time_N)[:, None], problem.block_count, axis=1),
        _picoseconds(problem.hop_NN),
        _picoseconds(problem.entry_N),
        _picoseconds(problem.exit_N),
        reach_NL,
        -np.array(cache_left, np.int64),
    )


def _picoseconds(times_s: Floats) -> Ints:
    return np.asarray(np.rint(np.minimum(times_s, 1e6) * _PER_SECOND), np.int64)


def _unseen(record: NodeRecord) -> NodeView:
    """A node that the snapshot leaves out, for it does not say yet how fast it is."""
    return NodeView(record.peer, record.block_time_s, record.memory_bytes, price=record.price)


def _timed(record: NodeRecord) -> bool:
    return math.isfinite(record.block_time_s) and record.block_time_s >= 0


def _why_not(
    records: Sequence[NodeRecord],
    nodes: Sequence[NodeRecord],
    roomy: Sequence[NodeRecord],
    block_count: int,
    needed_tokens: int,
    only_attested: bool,
) -> MissingBlocks | CacheFull:
    gaps = missing_blocks((blocks for r in nodes for blocks in r.ranges), block_count)
    if gaps:
        absent = [r for r in records if r not in nodes and _meet(r, gaps)]
        others = "; ".join(f"{r.peer} has {_ranges(r)} and is {_standing(r, only_attested)}" for r in absent)
        kind = "attested node" if only_attested else "node"
        return MissingBlocks(
            f"no {kind} serves blocks {', '.join(map(str, gaps))}" + (f" ({others})" if others else f"; add a {kind}")
        )
    gaps = missing_blocks((blocks for r in roomy for blocks in r.ranges), block_count)
    left = ", ".join(
        f"{r.cache_tokens_left} left on {r.peer} ({_ranges(r)})" for r in nodes if r not in roomy and _meet(r, gaps)
    )
    return CacheFull(f"the session needs {needed_tokens} tokens of cache on blocks {', '.join(map(str, gaps))}: {left}")


def _meet(record: NodeRecord, gaps: Sequence[BlockRange]) -> bool:
    return any(blocks.start < gap.end and gap.start < blocks.end for blocks in record.ranges for gap in gaps)


def _ranges(record: NodeRecord) -> str:
    return ", ".join(map(str, record.ranges))


def _standing(record: NodeRecord, only_attested: bool) -> str:
    if record.state != "serving":
        return record.state
    return "not attested, or set aside" if only_attested else "set aside"
