"""Simulated nodes: the real server, worker, mover and orchestrator, over a model of hashes on a machine of numbers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import bsns
from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape, NodeView
from bsns.node.capacity import Room
from bsns.node.orchestrator import best_plan
from bsns.node.peer import Peer
from bsns.node.server import RECORD_LIFETIME_S, Server
from bsns.planning.joining import choose_range
from bsns.protocol.records import NodeRecord
from bsns.simulator.clock import Machine, OwnClock, Process, VirtualLoop
from bsns.simulator.directory import Shelves, SimulatedDirectory
from bsns.simulator.model import DTYPE, HIDDEN_SIZE, HashExecutor
from bsns.simulator.network import SimulatedNetwork
from bsns.simulator.scenario import Nodes, Scenario
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership
from bsns.worker.faults import FaultyWorker
from bsns.worker.sessions import SessionTable

MODEL = ModelId("simulated")


@dataclass(slots=True)
class Swarm:
    """What all nodes and clients of a simulation share."""

    loop: VirtualLoop
    scenario: Scenario
    network: SimulatedNetwork
    shelves: Shelves
    founder: Founder
    rng: random.Random
    given_up: Callable[[BlockRange, str], None]
    """Told that a node takes no new sessions on a range any more because of a plan, and which node."""

    @property
    def shape(self) -> ModelShape:
        model = self.scenario.model
        return ModelShape(
            MODEL,
            self.scenario.name,
            (model.block_bytes,) * model.blocks,
            model.kv_bytes,
            model.hidden_bytes,
            dtype=DTYPE,
        )

    def peer(self, clock: OwnClock) -> Peer:
        """A new member of the swarm."""
        identity = Identity(self.rng.randbytes(32))
        membership = Membership.of_founder(self.founder, identity, clock.unix_s())
        transport = self.network.transport(identity.peer)
        directory = SimulatedDirectory(self.shelves, identity.peer, clock, self.scenario.ways.directory_ms / 1e3)
        return Peer(transport, membership, directory, None, "", clock)


class WatchedSessions(SessionTable):
    """A session table that says when it takes no new sessions on a range any more."""

    drained: Callable[[BlockRange], None] = staticmethod(lambda blocks: None)

    def drain(self, blocks: BlockRange) -> None:
        super().drain(blocks)
        self.drained(blocks)


class SimulatedNode:
    """A node from its start to its end; after that another takes its place under the same number."""

    def __init__(self, swarm: Swarm, number: int, kind: Nodes, machine: Machine, speed: float, stands: bool) -> None:
        """`speed`: how many times as fast as its kind says."""
        self.swarm = swarm
        self.number = number
        self.kind = kind
        self.process = Process(machine)
        self.speed = speed
        self.stands = stands
        self.slowness = 1.0
        self.clock = OwnClock(swarm.loop)
        self.server: Server | None = None
        self.executors: list[HashExecutor] = []
        self.alive = False

    @property
    def block_time_s(self) -> float:
        return self.kind.block_ms / 1e3 / self.speed

    @property
    def peer(self) -> PeerId | None:
        return self.server.peer.id if self.server is not None else None

    @property
    def most_blocks(self) -> int:
        return self.kind.most_blocks or self.swarm.scenario.model.blocks

    @property
    def memory_bytes(self) -> int:
        """What it announces to planners."""
        model = self.swarm.scenario.model
        return self.most_blocks * (model.block_bytes + model.kv_bytes * model.least_cache_tokens)

    def view(self) -> NodeView:
        """The node as it really is now, whatever others know of it."""
        assert self.peer is not None
        return NodeView(self.peer, self.block_time_s * self.slowness, self.memory_bytes, dtype=DTYPE)

    def holds(self) -> Sequence[BlockRange]:
        """The ranges on which it takes new sessions."""
        return self.server.worker.sessions.open_ranges if self.alive and self.server is not None else ()

    def sessions(self) -> int:
        return len(self.server.worker.sessions) if self.server is not None else 0

    async def start(self, first: BlockRange | None = None, *, loaded: bool = False) -> None:
        """Come up: choose a range (or take `first`), load it, unless it was `loaded` before, and serve."""
        swarm, kind, model = self.swarm, self.kind, self.swarm.scenario.model
        self.alive = True
        self.slowness = 1.0
        self.clock.ahead_s = 0.0
        peer = swarm.peer(self.clock)
        if kind.machine:
            swarm.network.processes[peer.id] = self.process
        present = await peer.directory.records()
        if kind.blocks != "auto":
            blocks = BlockRange.parse(kind.blocks, model.blocks)
        elif first is not None:
            blocks = first
        else:
            holders = [(held, 1.0 / max(record.block_time_s, 1e-6)) for record in present for held in record.ranges]
            blocks = choose_range(model.blocks, holders, self.most_blocks)
        least, memory_bytes = model.least_cache_tokens, self.memory_bytes
        cache_tokens = max(kind.cache_tokens, least)
        unix_s = self.clock.unix_s()
        record = NodeRecord(
            peer=peer.id,
            addresses=peer.transport.addresses,
            model=MODEL,
            model_name=swarm.scenario.name,
            block_count=model.blocks,
            start=blocks.start,
            end=blocks.end,
            state="joining",
            device="cpu",
            dtype=DTYPE,
            executor=HashExecutor.name,
            threads=1,
            cache_tokens=cache_tokens,
            cache_tokens_left=cache_tokens,
            block_time_s=0.0,
            rss_bytes=1,
            version=bsns.__version__,
            started_s=unix_s,
            expires_s=unix_s + RECORD_LIFETIME_S,
            memory_bytes=memory_bytes,
            follows=kind.blocks == "auto",
        )
        await peer.directory.publish(record)
        if not loaded:
            await asyncio.sleep(kind.load_s_per_block * len(blocks))
        sessions = WatchedSessions(
            model=MODEL, held=blocks, dtype=DTYPE, cache_tokens=cache_tokens, context_tokens=model.context_tokens
        )
        worker = FaultyWorker(
            self._load(blocks),
            sessions,
            peer.dial,
            block_time_s=self.block_time_s,
            rss_bytes=lambda: 1,
            clock=self.clock,
            short_s=0.0,
        )
        sessions.drained = self._given_up
        await peer.listen(worker.serve)
        self.server = Server(peer, worker, record, probes=swarm.scenario.probing)
        await self.server.publish()
        if kind.blocks == "auto":
            row_bytes = HIDDEN_SIZE * 4
            room = Room(
                usable_bytes=memory_bytes + (model.kv_bytes + row_bytes) * cache_tokens * self.most_blocks,
                block_bytes=(model.block_bytes,) * model.blocks,
                kv_bytes=model.kv_bytes,
                row_bytes=row_bytes,
                cache_bytes=(model.kv_bytes * self.most_blocks + row_bytes) * cache_tokens,
                least_tokens=least,
                most_tokens=cache_tokens,
            )
            self.server.follow(
                room,
                self._load_for_plan,
                swarm.shape,
                stands=self.stands,
                objective=Objective.named(swarm.scenario.objective),
                cache_tokens=least,
                lease_s=swarm.scenario.lease_s,
                planner=partial(best_plan, plan_s=swarm.scenario.plan_s),
            )

    def _given_up(self, blocks: BlockRange) -> None:
        if self.alive:  # a node that leaves does so by its owner's wish
            self.swarm.given_up(blocks, f"node {self.number} moved on")

    def _load(self, blocks: BlockRange) -> HashExecutor:
        executor = HashExecutor(blocks, self._cost)
        self.executors = [*self.executors, executor]
        return executor

    def _load_for_plan(self, blocks: BlockRange) -> HashExecutor:
        # on a machine of its own: a disk's work takes no core
        self.swarm.loop.spend(Process(Machine(self.swarm.loop)), self.kind.load_s_per_block * len(blocks))
        return self._load(blocks)

    def _cost(self, blocks: int, rows: int) -> None:
        compute_s = self.block_time_s * blocks * (1 + (rows - 1) / self.kind.rows_per_block)
        self.swarm.loop.spend(self.process, (compute_s + self.kind.overhead_ms / 1e3) * self.slowness)

    async def leave(self) -> None:
        """Say goodbye, hand the sessions over, and end."""
        server, self.alive = self.server, False
        if server is None:
            return
        await server.hand_over()
        await server.close()
        self._end()

    async def crash(self) -> None:
        """End without a word."""
        server, self.alive = self.server, False
        if server is None:
            return
        await server.peer.directory.close()
        self.swarm.network.kill(server.peer.id)
        await server.close()
        self._end()

    def leaks(self) -> str:
        """What sessions have left behind, in words; empty if nothing."""
        if self.server is None or not self.alive:
            return ""
        self.server.worker.sessions.check()
        caches = sum(len(executor.caches) for executor in self.executors)
        if self.sessions() or caches:
            return f"node {self.number} holds {self.sessions()} sessions and {caches} caches"
        return ""

    def _end(self) -> None:
        self.server = None
        self.executors = []
