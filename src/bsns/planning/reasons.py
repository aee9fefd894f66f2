"""Reasons, in words: why a node holds nothing under a plan, and what is missing where a model fits nowhere."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from bsns.core.errors import NotEnoughMemory
from bsns.core.plan import LeftOut, Objective
from bsns.core.snapshot import ModelShape
from bsns.core.words import size
from bsns.planning.bounds import most_work
from bsns.planning.network import Ints, Network
from bsns.planning.problem import Floats
from bsns.planning.replicas import Shared

WEIGHT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
SMALLER = ("int8", "int4")


def left_out(network: Network, shared: Shared, objective: Objective, *, replicas: bool) -> tuple[LeftOut, ...]:
    """A reason for each node outside the teams."""
    inside = {node for team in shared.teams for node in team.nodes}
    outside = [node for node in range(network.node_count) if node not in inside]
    if not outside:
        return ()
    smallest = float(network.bytes_L.min())
    least_range = min(float(network.bytes_L[team.start : team.end].sum()) for team in shared.teams)
    slowest_s = max(shared.stage_s)
    block_N = network.time_N * float(network.work_L.min())
    way_N = np.minimum(network.floors().way_N, network.ends_N)
    reasons: list[LeftOut] = []
    for node in outside:
        room, alone_s, way_s = float(network.memory_N[node]), float(block_N[node]), float(way_N[node])
        if room < smallest:
            reason = _no_block_fits(room, smallest)
        elif replicas and room < least_range:
            reason = f"no stage's range fits: it may use {size(room)}, the smallest takes {size(least_range)}"
        elif replicas:
            reason = (
                f"as a replica it would help no stage: one block takes {_ms(alone_s)} on it and its way to the nearest "
                f"{_ms(way_s)}, where the slowest stage takes {_ms(slowest_s)}"
            )
        elif alone_s > slowest_s:
            reason = f"one block alone would take {_ms(alone_s)} on it, the slowest stage takes {_ms(slowest_s)}"
        elif alone_s + way_s > slowest_s:
            reason = (
                f"its links are too slow: {_ms(way_s)} to the nearest and {_ms(alone_s)} for one block, "
                f"the slowest stage takes {_ms(slowest_s)}"
            )
        elif objective.bottleneck == 0:
            reason = "every token would take longer with it"
        else:
            reason = "no better plan with it was found"
        reasons.append(LeftOut(network.peers[node], reason))
    return tuple(reasons)


def left_out_by_weights(
    network: Network, shared: Shared, *, allowed: Collection[int], looked_at: Collection[int]
) -> tuple[LeftOut, ...]:
    """As `left_out`, under a plan by a user's own weights: `allowed` nodes may take part, `looked_at` those that could.

    No reason speaks of speed: what a node would cost depends on the weights.
    """
    inside = {node for team in shared.teams for node in team.nodes}
    may, seen = set(allowed), set(looked_at)
    smallest = float(network.bytes_L.min())
    reasons: list[LeftOut] = []
    for node in range(network.node_count):
        room = float(network.memory_N[node])
        if node in inside:
            continue
        if node not in may:
            reason = "it is not attested, which your weights ask for"
        elif room < smallest:
            reason = _no_block_fits(room, smallest)
        elif node not in seen:
            reason = f"not among the {len(seen)} nodes that were looked at"
        else:
            reason = "your weights prefer others"
        reasons.append(LeftOut(network.peers[node], reason))
    return tuple(reasons)


def holds_all(network: Network, nodes: Ints) -> bool:
    """Whether these nodes' memory holds all blocks, were they to fall as they fit best."""
    return _blocks_that_fit(network.bytes_L, network.memory_N[nodes]) >= len(network.bytes_L)


def check_room(network: Network, shape: ModelShape, cache_tokens: int) -> None:
    """Raises NotEnoughMemory where nodes cannot hold all blocks between them, however they are cut."""
    fitting = _blocks_that_fit(network.bytes_L, network.memory_N)
    if fitting < len(network.bytes_L):
        raise NotEnoughMemory(_shortage(network, shape, cache_tokens, fitting))


def no_chain_fits(network: Network, shape: ModelShape, cache_tokens: int) -> NotEnoughMemory:
    """For a model that would fit but for how its unequal blocks fall."""
    fitting = _blocks_that_fit(network.bytes_L, network.memory_N)
    return NotEnoughMemory(_shortage(network, shape, cache_tokens, fitting))


def _no_block_fits(room: float, smallest: float) -> str:
    return f"no room for one block: it may use {size(room)}, a block with its cache takes {size(smallest)}"


def _blocks_that_fit(bytes_L: Floats, memory_N: Floats) -> int:
    return int(most_work(np.ones(len(bytes_L)), bytes_L, memory_N).sum())


def _shortage(network: Network, shape: ModelShape, cache_tokens: int, fitting: int) -> str:
    need, have = float(network.bytes_L.sum()), float(network.memory_N.sum())
    nodes = f"{network.node_count} node" + "s" * (network.node_count > 1)
    head = (
        f"{shape.name} in {shape.dtype} takes {size(need)}, {cache_tokens} tokens of cache included; "
        f"the {nodes} may use {size(have)}"
    )
    if have < need:
        missing = f"{size(need - have)} are missing"
    else:
        largest = size(float(network.bytes_L.max()))
        counted = min(fitting, shape.block_count)
        missing = (
            f"enough in total, but blocks of {largest} do not divide over them: {counted} of {shape.block_count} fit"
            if fitting < shape.block_count
            else f"enough in total, but no order of the nodes was found in which blocks of up to {largest} fit"
        )
    return f"{head}: {missing}; {_remedy(network, shape, cache_tokens)}"


def _remedy(network: Network, shape: ModelShape, cache_tokens: int) -> str:
    bits = WEIGHT_BITS.get(shape.dtype)
    weights_L = np.array(shape.block_bytes, dtype=np.float64)
    for dtype in SMALLER:
        if bits is None or WEIGHT_BITS[dtype] >= bits:
            continue
        bytes_L = weights_L * WEIGHT_BITS[dtype] / bits + shape.kv_bytes_per_token_per_block * cache_tokens
        if _blocks_that_fit(bytes_L, network.memory_N) >= shape.block_count:
            return f"in {dtype} it would fit ({size(float(bytes_L.sum()))})"
    if cache_tokens and _blocks_that_fit(weights_L, network.memory_N) >= shape.block_count:
        return "it would fit with fewer cache tokens"
    return "it would not fit in int4 either; add nodes" if bits else "add nodes"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
