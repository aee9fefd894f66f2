"""The chain problem: blocks in a row, unequal nodes and links, as arrays; and what a chain of nodes costs in it.

Suffixes say the axes: L blocks, N nodes. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsns.core.errors import BadSnapshot
from bsns.core.ids import PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import (
    LEAST_BYTES_PER_S,
    MAX_TIME_S,
    Link,
    ModelShape,
    NodeView,
    Snapshot,
    check_node,
    check_shape,
)

Floats = NDArray[np.float64]

ASSUMED_ROUND_TRIP_S = 0.02
"""Of a link that neither was measured nor can be guessed from its ends' other links."""
ASSUMED_BYTES_PER_S = 12.5e6


class Stage(NamedTuple):
    """Node number `node` computes blocks [start, end)."""

    node: int
    start: int
    end: int


Chain = tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """Cut a row of blocks into ranges for nodes that each appear at most once; any node may be left out.

    Stage j, on node n after node m, costs f = work · time_N[n] + hop_NN[m, n] (the first: entry_N[n]). The bottleneck
    is the largest f, or the client's own turn exit_N[last] + client_s if that is larger; the latency is the sum of all
    of them. A stage's `bytes_L` must fit its node's `memory_N`.
    """

    work_L: Floats
    """In units of an average block."""
    bytes_L: Floats
    """Weights, and the caches of the sessions promised."""
    time_N: Floats
    """Seconds per unit of work."""
    memory_N: Floats
    hop_NN: Floats
    entry_N: Floats
    exit_N: Floats
    client_s: float
    """Embedding, head and sampling."""
    peers: tuple[PeerId, ...]
    assumptions: tuple[str, ...] = ()

    @property
    def block_count(self) -> int:
        return len(self.work_L)

    @property
    def node_count(self) -> int:
        return len(self.time_N)

    def stage_s(self, chain: Chain) -> list[float]:
        """f of each stage."""
        seconds: list[float] = []
        before: int | None = None
        for node, start, end in chain:
            way_in = self.entry_N[node] if before is None else self.hop_NN[before, node]
            seconds.append(float(self.work_L[start:end].sum() * self.time_N[node] + way_in))
            before = node
        return seconds

    def cost(self, chain: Chain) -> tuple[float, float]:
        """(bottleneck_s, latency_s) of a chain."""
        seconds = [*self.stage_s(chain), float(self.exit_N[chain[-1].node] + self.client_s)]
        return max(seconds), sum(seconds)

    def value(self, chain: Chain, objective: Objective) -> float:
        return objective.value(*self.cost(chain))

    def fits(self, chain: Chain) -> bool:
        """Whether a chain covers all blocks in order, uses each node once, and fits every node's memory."""
        reached = 0
        for node, start, end in chain:
            if start != reached or not start < end or self.bytes_L[start:end].sum() > self.memory_N[node]:
                return False
            reached = end
        return reached == self.block_count and len({stage.node for stage in chain}) == len(chain)


def chain_problem(
    snapshot: Snapshot,
    shape: ModelShape,
    *,
    cache_tokens: int = 0,
    tokens: int = 1,
    client_s: float = 0.0,
    nodes: Sequence[NodeView] | None = None,
) -> ChainProblem:
    """The snapshot's nodes (or `nodes` of them) and links as a problem for this model.

    Every node promises `cache_tokens` of cache; a hop carries `tokens` tokens. A link nobody measured is assumed to be
    as slow as the slower of its ends' median links, which `assumptions` says. Raises BadSnapshot.
    """
    check_shape(shape)
    chosen = tuple(snapshot.nodes if nodes is None else nodes)
    if not chosen:
        raise BadSnapshot("the snapshot has no nodes; start some with bsns serve")
    for node in chosen:
        check_node(node)
    count = len(chosen)
    size = shape.hidden_bytes * tokens
    index = {node.peer: number for number, node in enumerate(chosen)}
    hop_NN = np.full((count, count), np.nan)
    for (one, other), link in snapshot.links.items():
        a, b = index.get(one), index.get(other)
        if a is not None and b is not None:
            hop_NN[a, b] = hop_NN[b, a] = transfer_s(link, size)
    notes = list(snapshot.assumptions)
    np.fill_diagonal(hop_NN, 0.0)
    missing_NN = np.isnan(hop_NN)
    if missing_NN.any():
        typical_N = _typical_s(hop_NN, ASSUMED_ROUND_TRIP_S / 2 + size / ASSUMED_BYTES_PER_S)
        hop_NN = np.where(missing_NN, np.maximum(typical_N[:, None], typical_N[None, :]), hop_NN)
        notes.append(
            f"{int(missing_NN.sum()) // 2} of {count * (count - 1) // 2} links were not measured; each is assumed "
            "to be as slow as the slower of its ends' median links"
        )
    ends_N = np.zeros(count)
    if snapshot.client:
        known = {peer: transfer_s(link, size) for peer, link in snapshot.client.items()}
        farthest_s = max(known.values())
        ends_N = np.array([known.get(node.peer, farthest_s) for node in chosen])
        if any(node.peer not in known for node in chosen):
            notes.append("the client's way to some nodes was not measured; it is assumed to be as slow as its slowest")
    return ChainProblem(
        work_L=np.array(shape.work, dtype=np.float64),
        bytes_L=np.array(shape.block_bytes, dtype=np.float64) + shape.kv_bytes_per_token_per_block * cache_tokens,
        time_N=np.array([node.block_time_s for node in chosen]),
        memory_N=np.array([node.memory_bytes for node in chosen], dtype=np.float64),
        hop_NN=hop_NN,
        entry_N=ends_N,
        exit_N=ends_N,
        client_s=client_s,
        peers=tuple(node.peer for node in chosen),
        assumptions=tuple(notes),
    )


def transfer_s(link: Link, size: float) -> float:
    """A message's way along a link. Raises BadSnapshot for impossible figures."""
    if not (0 <= link.round_trip_s <= MAX_TIME_S and link.bytes_per_s >= LEAST_BYTES_PER_S):
        raise BadSnapshot(f"a link has a round trip of {link.round_trip_s} s and {link.bytes_per_s} bytes/s")
    return link.transfer_s(size)


def _typical_s(hop_NN: Floats, otherwise_s: float) -> Floats:
    """Each node's median measured link; that of the whole network, or `otherwise_s`, for nodes without any."""
    count = len(hop_NN)
    measured_NN = ~np.isnan(hop_NN) & ~np.eye(count, dtype=bool)
    overall_s = float(np.median(hop_NN[measured_NN])) if measured_NN.any() else otherwise_s
    return np.array(
        [float(np.median(hop_NN[n][measured_NN[n]])) if measured_NN[n].any() else overall_s for n in range(count)]
    )
