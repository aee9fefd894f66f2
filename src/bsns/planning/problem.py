"""The chain problem: blocks in a row, unequal nodes and links, as arrays; and what a chain of nodes costs in it.

Suffixes say the axes: L blocks, N nodes. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsns.core.ids import PeerId
from bsns.core.plan import Objective

Floats = NDArray[np.float64]


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
