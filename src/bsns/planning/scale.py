"""Thousands of nodes: which few are worth a table of all pairs.

A model has some dozens of blocks, so no chain needs more nodes than that. Candidates are the nodes of good greedy
chains along measured links, grown from many promising nodes, and those that do most for themselves.
"""

from __future__ import annotations

import numpy as np

from bsns.planning.bounds import bottleneck_floor
from bsns.planning.network import Ints, Network

DENSE_NODES = 96
"""Up to so many nodes all of them are looked at."""
CANDIDATES = 64
SEEDS = 24


def candidates(network: Network) -> Ints:
    """The numbers of the nodes to plan with; all of them in a small network."""
    if network.node_count <= DENSE_NODES:
        return np.arange(network.node_count)
    floors = network.floors()
    limit_s = 2.0 * bottleneck_floor(floors, replicas=False)
    limit_s = max(limit_s, float(np.median(network.time_N + network.typical_N)))
    chosen: list[int] = []
    work = float(network.work_L.sum())
    done_N = np.minimum(floors.most_N, np.maximum(limit_s - floors.way_N, 0.0) / network.time_N)
    steady_N = np.minimum(floors.most_N, np.maximum(limit_s - network.typical_N, 0.0) / network.time_N)
    quick_N = network.time_N + np.maximum(network.typical_N, network.ends_N) / np.maximum(floors.most_N, 1e-9)
    quick_N = np.where(floors.most_N > 0, quick_N, np.inf)
    ranks = [
        np.argsort(-steady_N, kind="stable"),
        np.argsort(quick_N, kind="stable"),
        np.argsort(-done_N, kind="stable"),
    ]
    chains = [
        _grow(network, floors.most_N, int(seed), limit_s, work)
        for seed in dict.fromkeys(int(rank[at]) for at in range(SEEDS) for rank in ranks)
    ]
    chains = [chain for chain in chains if chain]
    chains.sort(key=len)
    picks = [*(node for chain in chains[:2] for node in chain)]
    for at in range(CANDIDATES):
        picks += [int(rank[at]) for rank in ranks[:2]]
    picks += [node for chain in chains[2:6] for node in chain]
    for node in picks:
        if node not in chosen and floors.most_N[node] > 0:
            chosen.append(node)
        if len(chosen) >= CANDIDATES:
            break
    return np.array(sorted(chosen), dtype=np.int64)


def _grow(network: Network, most_N: np.ndarray, seed: int, limit_s: float, work: float) -> list[int]:
    """A greedy chain along measured links: always on to the neighbour that does most within the limit."""
    chain, done = [seed], min(float(most_N[seed]), limit_s / float(network.time_N[seed]))
    been = {seed}
    while done < work:
        start, end = np.searchsorted(network.from_E, [chain[-1], chain[-1] + 1])
        to, way = network.to_E[start:end], network.way_E[start:end]
        gain = np.minimum(most_N[to], (limit_s - way) / network.time_N[to])
        gain = np.where([node in been for node in to.tolist()], -1.0, gain) if len(to) else gain
        if not len(gain) or gain.max() <= 0:
            return []
        at = int(gain.argmax())
        chain.append(int(to[at]))
        been.add(int(to[at]))
        done += float(gain[at])
    return chain
