"""`bsns bench swarm`: does a planned layout run as fast as predicted?

For each random setting an emulated network of unequal nodes serves the model three times over: split equally, as
planned for one stream (latency), and as planned for many (throughput). Speeds are predicted from what the equally
split swarm measured of itself, then measured; layouts take turns, round after round, and medians count.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog

from bsns.bench.emulation import Network, go_first, in_turn, measure
from bsns.bench.layouts import Layout, as_plan, compared_speeds, measure_client_s, summary, until_answering
from bsns.bench.settings import CLIENT, Setting, draw_settings
from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerError, PeerTimedOut
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.model.shapes import shape_of
from bsns.model.source import ModelSource, resolve
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.node.snapshots import observe_snapshot
from bsns.planning.joining import equal_split
from bsns.planning.network import chain_problem
from bsns.planning.planner import make_plan
from bsns.planning.problem import Chain, Stage
from bsns.worker.throttle import VARIABLE

DTYPE = "bfloat16"
NODES = 6
STREAMS = 8
ROUNDS = 3
CACHE_TOKENS = 1024
NODE_TOKENS = 4096
"""Of cache that a node really has; what it may plan with is drawn with the setting."""
PLAN_S = 3.0
LOOK_S = 60.0
"""How long nodes may take to measure all their ways to each other."""

AT_ONCE = 2
"""Nodes that start at the same time, of which each shall have a core."""

Told = Callable[[str], None]
log = structlog.get_logger(__name__)


async def bench_swarm(model: str, *, settings: int, seed: int, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. Raises BadOption where no network can be emulated."""
    load_before = os.getloadavg()[0]
    started_s = time.monotonic()
    told("looking at the model")
    source = await asyncio.to_thread(resolve, model)
    shape = shape_of(source, DTYPE)
    nodes = min(NODES, source.block_count)
    rows: list[dict[str, Any]] = []
    with Network(nodes + 1) as network, network.entered(CLIENT):
        go_first()
        bench = Bench(model, source, shape, network, seed, 1 if quick else ROUNDS)
        ways: list[dict[str, float]] = []
        for setting in draw_settings(shape, count=settings, nodes=nodes, cache_tokens=CACHE_TOKENS, seed=seed):
            network.shape(setting.ways)
            ways += await asyncio.to_thread(_asked_and_found, network, setting)

            def say(what: str, number: int = setting.number) -> None:
                told(f"setting {number + 1} of {settings}: {what}")

            rows.append(await bench.measure(setting, say))
        counts = network.counts()
    return {
        "settings": rows,
        "summary": summary(rows),
        "network": {"ways": ways, "packets": counts.packets, "dropped": counts.dropped},
        "model": {"name": source.name, "blocks": source.block_count},
        "seed": seed,
        "quick": quick,
        "streams": STREAMS,
        "took_s": round(time.monotonic() - started_s),
        "load_before": round(load_before, 2),
    }


def _asked_and_found(network: Network, setting: Setting) -> list[dict[str, float]]:
    """Of a few ways what was asked and what a program finds."""
    rows = []
    for place in (1, 2):
        asked, found = setting.ways[0, place], measure(network, 0, place, echoes=9, bulk_bytes=1 << 18)
        row = {
            "asked_ms": asked.delay_s * 1e3,
            "found_ms": found.delay_s * 1e3,
            "asked_mbit_per_s": asked.bytes_per_s * 8e-6,
            "found_mbit_per_s": found.bytes_per_s * 8e-6,
        }
        rows.append({name: round(value, 2) for name, value in row.items()})
    return rows


@dataclass(frozen=True, slots=True)
class Bench:
    """What stays the same over all settings."""

    model: str
    source: ModelSource
    shape: ModelShape
    network: Network
    seed: int
    rounds: int

    async def measure(self, setting: Setting, told: Told) -> dict[str, Any]:
        """Serve one setting's layouts and compare them."""
        async with AsyncExitStack() as stack:
            told("starting the equal split")
            split = dict(enumerate(equal_split(self.source.block_count, setting.nodes)))
            client, invite = await self._serve(stack, setting, split)
            told("measuring nodes and links")
            client_s = await measure_client_s(client)
            seen = await self._look(invite, setting)
            problem = chain_problem(seen, self.shape, cache_tokens=CACHE_TOKENS, client_s=client_s)
            chains = {"equal": tuple(Stage(node, blocks.start, blocks.end) for node, blocks in split.items())}
            for name in ("latency", "throughput"):
                told(f"planning for {name}")
                chains[name] = await asyncio.to_thread(self._plan, seen, Objective.named(name), client_s)
            layouts: dict[str, Layout] = {}
            for name, chain in chains.items():
                same = next((layout for layout in layouts.values() if layout.chain == chain), None)
                if same is None:
                    told(f"starting the layout for {name}")
                    ranges = {stage.node: BlockRange(stage.start, stage.end) for stage in chain}
                    its_client = client if name == "equal" else (await self._serve(stack, setting, ranges))[0]
                    same = Layout(chain, its_client, as_plan(self.shape, problem, chain))
                layouts[name] = same
            for number in range(self.rounds):
                for objective, streams in (("latency", 1), ("throughput", STREAMS)):
                    told(f"round {number + 1} of {self.rounds}: {objective}")
                    for layout in dict.fromkeys((layouts["equal"], layouts[objective])):
                        await layout.run(streams)
        return {
            "number": setting.number,
            "asked_block_time_ms": [round(time_s * 1e3, 3) for time_s in setting.block_time_s],
            "block_time_ms": [round(node.block_time_s * 1e3, 3) for node in seen.nodes],
            "room_blocks": [int(size // max(problem.bytes_L)) for size in setting.memory_bytes],
            "client_ms": round(client_s * 1e3, 2),
            "assumptions": list(problem.assumptions),
            "latency": compared_speeds(layouts["equal"], layouts["latency"], 1),
            "throughput": compared_speeds(layouts["equal"], layouts["throughput"], STREAMS),
        }

    async def _serve(
        self, stack: AsyncExitStack, setting: Setting, ranges: Mapping[int, BlockRange]
    ) -> tuple[Client, str]:
        """Start the nodes that hold these ranges, and a client of theirs."""
        swarm = LocalSwarm(self.model, (), dtype=DTYPE, own_home=Home(self.network.address(CLIENT)))
        await stack.enter_async_context(swarm)
        numbers = sorted(ranges)
        for first in range(0, len(numbers), AT_ONCE):
            await asyncio.gather(
                *(self._start(swarm, setting, node, ranges[node]) for node in numbers[first : first + AT_ONCE])
            )
        client = await stack.enter_async_context(
            Client.on(swarm.peer, self.source, dtype=DTYPE, speculate=False, keep_sessions=0)
        )
        await until_answering(client)
        return client, swarm.peer.invite

    async def _start(self, swarm: LocalSwarm, setting: Setting, node: int, blocks: BlockRange) -> None:
        """Start a node; once more, as its owner would, if it met nobody in time: that happens on a busy machine."""
        place = node + 1
        slowness = {VARIABLE: f"{setting.block_time_s[node] * 1e3:.4f}"}
        home = Home(self.network.address(place), self.network.file(place), slowness)
        words = ("--blocks", str(blocks), "--cache-tokens", str(NODE_TOKENS))
        try:
            await swarm.add(blocks, words, home=home)
        except PeerError as error:
            log.warning("starting a node again", place=place, reason=error.message)
            await swarm.add(blocks, words, home=home)

    async def _look(self, invite: str, setting: Setting) -> Snapshot:
        """The equally split swarm as it shows itself, its nodes in their order, with the memory they are to have.

        Raises PeerTimedOut if nodes have not measured their ways to each other in time.
        """
        pairs = setting.nodes * (setting.nodes - 1) // 2
        give_up_s = time.monotonic() + LOOK_S
        seen = await observe_snapshot(invite)
        while len(seen.nodes) < setting.nodes or len(seen.links) < pairs:
            if time.monotonic() > give_up_s:
                raise PeerTimedOut(
                    f"after {LOOK_S:g} s {len(seen.nodes)} of {setting.nodes} nodes and {len(seen.links)} of {pairs} "
                    "links are in the snapshot"
                )
            await asyncio.sleep(1.0)
            seen = await observe_snapshot(invite)
        nodes = sorted(seen.nodes, key=lambda node: node.held[0].start)
        roomy = (replace(node, memory_bytes=size) for node, size in zip(nodes, setting.memory_bytes, strict=True))
        return replace(seen, nodes=tuple(roomy))

    def _plan(self, seen: Snapshot, objective: Objective, client_s: float) -> Chain:
        """The chain that is planned; nodes by their numbers."""
        end_s = time.monotonic() + PLAN_S
        with in_turn():
            plan = make_plan(
                seen,
                self.shape,
                objective=objective,
                cache_tokens=CACHE_TOKENS,
                client_s=client_s,
                rng=np.random.default_rng(self.seed),
                remaining_s=lambda: end_s - time.monotonic(),
                replicas=False,  # a route goes through one node of each stage
            )
        numbers = {node.peer: number for number, node in enumerate(seen.nodes)}
        return tuple(Stage(numbers[stage.peer], stage.blocks.start, stage.blocks.end) for stage in plan.stages)
