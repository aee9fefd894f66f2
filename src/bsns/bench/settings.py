"""Settings: random swarms of unequal nodes and links, to be emulated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bsns.bench.emulation import Way
from bsns.core.snapshot import ModelShape

CLIENT = 0
"""The client's place in the network; node n is at place n + 1."""
BLOCK_TIMES_S = (0.003, 0.018)
"""The fastest and the slowest node, for a block and a token: six times what a block of SmolLM2-135M takes a core. With
2 ms two cores were half busy with six nodes and their client, and nodes that woke up had to wait for one."""
DELAYS_S = (0.0005, 0.025)
RATES_BYTES_PER_S = (2.5e6, 125e6)
PLENTY = (1.5, 2.5)
"""How many times what the model needs the nodes' memory is together."""
LARGEST = 0.8
"""No node holds more than this share of the model."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One swarm. Nodes are numbered from 0; `ways` are those between places, the same in both directions."""

    number: int
    block_time_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]
    """For weights and caches."""
    ways: dict[tuple[int, int], Way]

    @property
    def nodes(self) -> int:
        return len(self.block_time_s)


def draw_settings(shape: ModelShape, *, count: int, nodes: int, cache_tokens: int, seed: int) -> Iterator[Setting]:
    """Settings of `nodes` nodes, each of which could hold an equal share of the model and none of which all of it."""
    block_bytes = max(shape.block_bytes) + shape.kv_bytes_per_token_per_block * cache_tokens
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        times_s = _spread(rng, nodes, *BLOCK_TIMES_S)
        blocks = _memory_blocks(rng, nodes, shape.block_count)
        pairs = list(itertools.combinations(range(nodes + 1), 2))
        delays_s = _log_uniform(rng, *DELAYS_S, len(pairs))
        rates = _log_uniform(rng, *RATES_BYTES_PER_S, len(pairs))
        ways = {}
        for (one, other), delay_s, rate in zip(pairs, delays_s, rates, strict=True):
            ways[one, other] = ways[other, one] = Way(float(delay_s), float(rate))
        memory = tuple(int((count + 0.5) * block_bytes) for count in blocks)
        yield Setting(number, tuple(float(time_s) for time_s in times_s), memory, ways)


def _log_uniform(rng: np.random.Generator, least: float, most: float, count: int) -> NDArray[np.float64]:
    return np.asarray(np.exp(rng.uniform(np.log(least), np.log(most), count)))


def _spread(rng: np.random.Generator, count: int, least: float, most: float) -> NDArray[np.float64]:
    """Log-uniform draws, stretched so that the extremes are met."""
    logs = np.sort(rng.uniform(0.0, 1.0, count))
    logs = (logs - logs[0]) / (logs[-1] - logs[0])
    return rng.permutation(least * (most / least) ** logs)


def _memory_blocks(rng: np.random.Generator, nodes: int, block_count: int) -> list[int]:
    """How many blocks each node has room for."""
    shares = _log_uniform(rng, 1.0, 4.0, nodes)
    room = shares / shares.sum() * rng.uniform(*PLENTY) * block_count
    least, most = -(-block_count // nodes), max(-(-block_count // nodes), int(LARGEST * block_count))
    return [int(blocks) for blocks in np.clip(np.round(room), least, most)]
