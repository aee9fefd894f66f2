"""The network as planning sees it: every node, and ways between any two, without a table of all pairs.

A way that nobody measured counts as the slower of its ends' median ways, so a swarm of ten thousand nodes needs only
its measured links. `problem` cuts out the chain problem of some of the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import BadSnapshot
from bsns.core.ids import PeerId
from bsns.core.snapshot import (
    ASSUMED_LINK,
    ASSUMED_WORDS,
    LEAST_BYTES_PER_S,
    MAX_TIME_S,
    Link,
    ModelShape,
    Snapshot,
    check_node,
    check_shape,
)
from bsns.planning.bounds import Floors, most_work
from bsns.planning.problem import ChainProblem, Floats

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Network:
    """Nodes N, and links E that were measured, each once in either direction and sorted by `from_E`."""

    work_L: Floats
    bytes_L: Floats
    time_N: Floats
    memory_N: Floats
    ends_N: Floats
    """The client's way to each node, and back."""
    client_s: float
    typical_N: Floats
    """Median measured way of each node; an unmeasured way is the slower of its ends' medians."""
    from_E: Ints
    to_E: Ints
    way_E: Floats
    peers: tuple[PeerId, ...]
    assumptions: tuple[str, ...]

    @property
    def node_count(self) -> int:
        return len(self.time_N)

    @classmethod
    def of(cls, snapshot: Snapshot, shape: ModelShape, *, cache_tokens: int = 0, client_s: float = 0.0) -> Network:
        """The snapshot's nodes and links for this model; every node promises `cache_tokens` of cache.

        What nobody measured is assumed, and `assumptions` says so. Raises BadSnapshot.
        """
        check_shape(shape)
        nodes = snapshot.nodes
        if not nodes:
            raise BadSnapshot("the snapshot has no nodes; start some with bsns serve")
        if not (0 <= client_s < math.inf and cache_tokens >= 0):
            raise BadSnapshot(f"the client's turn of {client_s} s or a cache of {cache_tokens} tokens is impossible")
        for node in nodes:
            check_node(node)
        count, size = len(nodes), shape.hidden_bytes
        index = {node.peer: number for number, node in enumerate(nodes)}
        if len(index) < count:
            raise BadSnapshot("two nodes of the snapshot have the same peer id")
        one: list[int] = []
        other: list[int] = []
        ways: list[float] = []
        for (a, b), link in snapshot.links.items():
            if a in index and b in index:
                one.append(index[a])
                other.append(index[b])
                ways.append(transfer_s(link, size))
        from_E, to_E = np.array(one + other, dtype=np.int64), np.array(other + one, dtype=np.int64)
        order = np.lexsort((to_E, from_E))
        from_E, to_E, way_E = from_E[order], to_E[order], np.array(ways + ways)[order]
        notes = list(snapshot.assumptions)
        possible = count * (count - 1) // 2
        missing = possible - len(ways)
        if missing and not ways:
            notes.append(f"no link was measured; each is assumed to have {ASSUMED_WORDS}")
        elif missing:
            notes.append(
                f"{missing} of {possible} links {'was' if missing == 1 else 'were'} not measured; each is assumed "
                "to be as slow as the slower of its ends' median links"
            )
            if len(set(one + other)) < count:
                notes.append("a node without any measured link counts with the median of all links")
        ends_N = np.zeros(count)
        if snapshot.client:
            known = {peer: transfer_s(link, size) for peer, link in snapshot.client.items()}
            farthest_s = max(known.values())
            ends_N = np.array([known.get(node.peer, farthest_s) for node in nodes])
            if any(node.peer not in known for node in nodes):
                notes.append(
                    "the client's way to some nodes was not measured; it is assumed to be as slow as its slowest"
                )
        else:
            notes.append("no client's way to a node was measured; the way in and the way back count as 0 ms")
        return cls(
            work_L=np.array(shape.work, dtype=np.float64),
            bytes_L=np.array(shape.block_bytes, dtype=np.float64) + shape.kv_bytes_per_token_per_block * cache_tokens,
            time_N=np.array([node.block_time_s for node in nodes]),
            memory_N=np.array([node.memory_bytes for node in nodes], dtype=np.float64),
            ends_N=ends_N,
            client_s=client_s,
            typical_N=_medians(from_E, way_E, count, ASSUMED_LINK.transfer_s(size)),
            from_E=from_E,
            to_E=to_E,
            way_E=way_E,
            peers=tuple(node.peer for node in nodes),
            assumptions=tuple(notes),
        )

    def ways(self, rows: Sequence[int] | Ints, columns: Sequence[int] | Ints) -> Floats:
        """(R, C) One token's way from each of `rows` to each of `columns`; 0 from a node to itself."""
        rows, columns = np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64)
        table = np.maximum(self.typical_N[rows, None], self.typical_N[None, columns])
        place_N = np.full(self.node_count, -1)
        place_N[columns] = np.arange(len(columns))
        starts = np.searchsorted(self.from_E, rows, side="left")
        ends = np.searchsorted(self.from_E, rows, side="right")
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            at = place_N[self.to_E[start:end]]
            table[row, at[at >= 0]] = self.way_E[start:end][at >= 0]
        same = place_N[rows]
        table[np.flatnonzero(same >= 0), same[same >= 0]] = 0.0
        return table

    def problem(self, nodes: Sequence[int] | Ints) -> ChainProblem:
        """The chain problem of these nodes, numbered as they stand there."""
        chosen = np.asarray(nodes, dtype=np.int64)
        return ChainProblem(
            self.work_L,
            self.bytes_L,
            self.time_N[chosen],
            self.memory_N[chosen],
            self.ways(chosen, chosen),
            self.ends_N[chosen],
            self.ends_N[chosen],
            self.client_s,
            tuple(self.peers[node] for node in chosen.tolist()),
            self.assumptions,
        )

    def mean_way(self, nodes: Ints, share: Floats) -> Floats:
        """(N,) The way to every node from `nodes`, averaged with their shares, which sum to 1."""
        order = np.argsort(self.typical_N[nodes], kind="stable")
        typical, weight = self.typical_N[nodes][order], share[order]
        below = np.concatenate([[0.0], np.cumsum(weight)])
        above_s = np.concatenate([np.cumsum((weight * typical)[::-1])[::-1], [0.0]])
        at_N = np.searchsorted(typical, self.typical_N, side="right")
        mean_N = below[at_N] * self.typical_N + above_s[at_N]
        share_N = np.zeros(self.node_count)
        share_N[nodes] = share
        if len(self.from_E):
            slower_E = np.maximum(self.typical_N[self.from_E], self.typical_N[self.to_E])
            correction_E = share_N[self.from_E] * (self.way_E - slower_E)
            mean_N += np.bincount(self.to_E, weights=correction_E, minlength=self.node_count)
        return np.asarray(np.maximum(mean_N, 0.0))

    def floors(self) -> Floors:
        """What bounds on plans over all nodes need."""
        count = self.node_count
        cheapest_N = np.full(count, math.inf)
        np.minimum.at(cheapest_N, self.to_E, self.way_E)
        measured_N = np.bincount(self.to_E, minlength=count)
        # an unmeasured way is at least as slow as its slower end's median
        cheapest_N = np.where(measured_N < count - 1, np.minimum(cheapest_N, self.typical_N), cheapest_N)
        most_N = most_work(self.work_L, self.bytes_L, self.memory_N)
        return Floors(self.work_L, self.time_N, most_N, cheapest_N, self.ends_N, self.ends_N, self.client_s)


def chain_problem(
    snapshot: Snapshot, shape: ModelShape, *, cache_tokens: int = 0, client_s: float = 0.0
) -> ChainProblem:
    """The problem of all nodes of a snapshot, see `Network.of`: a table of all pairs. Raises BadSnapshot."""
    network = Network.of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s)
    return network.problem(range(network.node_count))


def transfer_s(link: Link, size: float) -> float:
    """A message's way along a link. Raises BadSnapshot for impossible figures."""
    if not (0 <= link.round_trip_s <= MAX_TIME_S and link.bytes_per_s >= LEAST_BYTES_PER_S):
        raise BadSnapshot(f"a link has a round trip of {link.round_trip_s} s and {link.bytes_per_s} bytes/s")
    return link.transfer_s(size)


def _medians(from_E: Ints, way_E: Floats, count: int, otherwise_s: float) -> Floats:
    """Each node's median; that of all ways, or `otherwise_s`, for nodes without any."""
    overall_s = float(np.median(way_E)) if len(way_E) else otherwise_s
    order = np.lexsort((way_E, from_E))
    sorted_E = way_E[order]
    degree_N = np.bincount(from_E, minlength=count)
    start_N = np.concatenate([[0], np.cumsum(degree_N)[:-1]])
    if not len(sorted_E):
        return np.full(count, overall_s)
    low_N = np.minimum(start_N + np.maximum(degree_N - 1, 0) // 2, len(sorted_E) - 1)
    high_N = np.minimum(start_N + degree_N // 2, len(sorted_E) - 1)
    return np.where(degree_N > 0, (sorted_E[low_N] + sorted_E[high_N]) / 2, overall_s)
