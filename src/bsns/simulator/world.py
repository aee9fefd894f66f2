"""A simulation from beginning to end: nodes come up, clients ask, faults strike, and what must hold is watched."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import NodeView, Snapshot
from bsns.node.orchestrator import best_plan
from bsns.planning.exact import solve_exactly
from bsns.planning.joining import weakest_range
from bsns.planning.layouts import layout_cost
from bsns.planning.network import chain_problem
from bsns.simulator.clients import SimulatedClient, Told, keep_asking
from bsns.simulator.clock import Machine, VirtualLoop, run
from bsns.simulator.directory import Shelves
from bsns.simulator.network import SimulatedNetwork, Way
from bsns.simulator.nodes import SimulatedNode, Swarm
from bsns.simulator.scenario import Fault, Scenario
from bsns.swarm.invites import Founder
from bsns.worker.faults import FaultyWorker

RESTART_S = 3.0
"""How long a process takes that comes back, before it loads."""
FREED_S = 2.0
"""How long sessions may be held once their answers have ended."""
FLAP_S = 0.7
JUMP_S = 3600.0
"""How far clocks jump where faults are drawn by lot, ahead and back by turns: as where summer time is taken for UTC."""
EXACT_S = 20.0
"""Real seconds that finding the best layout may take."""
THROUGHPUT = Objective()
SETTLE_S = 0.5
"""What faults have left is waited for, before the last look at what is held still."""


@dataclass(slots=True)
class Struck:
    """A fault that was injected, and how many sessions its node had then."""

    fault: Fault
    sessions: int
    happened: bool
    """False: its node was not there."""


@dataclass(slots=True)
class Outcome:
    """What a simulation brought."""

    scenario: Scenario
    answers: list[Told] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    releases: int = 0
    """How often a node has let go of a range because a plan said so."""
    uncovered: list[str] = field(default_factory=list)
    """Blocks that a decision, no fault, has left to nobody."""
    leaks: list[str] = field(default_factory=list)
    repairs: int = 0
    moves: int = 0
    joined: int = 0
    left: int = 0
    plans: int = 0
    """Published, by whoever was the orchestrator."""
    bytes: int = 0
    frames: int = 0
    lost_frames: int = 0
    simulated_s: float = 0.0
    throughput: list[tuple[float, float, float]] = field(default_factory=list)
    """When; what the layout lets through then, and the best layout would: tokens per second without batching."""

    @property
    def problems(self) -> list[str]:
        """What must never be, in words."""
        deadline_s = self.scenario.clients.deadline_s
        told = [(answer, answer.problem(deadline_s)) for answer in self.answers]
        bad = [f"client {a.client} at {a.asked_s:.3f} s: {problem}" for a, problem in told if problem]
        return [*bad, *self.uncovered, *self.leaks]

    @property
    def errors(self) -> Counter[str]:
        """Answers that ended with a typed error, by its code."""
        return Counter(answer.error for answer in self.answers if answer.error is not None)


class World:
    """A swarm while it is simulated."""

    def __init__(self, loop: VirtualLoop, scenario: Scenario) -> None:
        self.loop = loop
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.outcome = Outcome(scenario)
        ways = scenario.ways
        near = Way(ways.round_trip_ms / 1e3, ways.mbit * 125e3, ways.loss)
        far = Way(ways.far_round_trip_ms / 1e3, ways.far_mbit * 125e3, ways.loss)
        self._region: dict[PeerId, int] = {}

        def way(one: PeerId, other: PeerId) -> Way:
            return near if self._region_of(one) == self._region_of(other) else far

        network = SimulatedNetwork(loop, way, scenario.model.hidden_bytes, random.Random(self.rng.random()))
        self.swarm = Swarm(
            loop,
            scenario,
            network,
            Shelves(network, loop.unix_s, ways.directory_ms / 1e3),
            Founder(self.rng.randbytes(32)),
            random.Random(self.rng.random()),
            self._given_up,
        )
        self._machines: dict[str, Machine] = {}
        self.nodes = self._make_nodes()
        self.clients: list[SimulatedClient] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._groups = 0
        self._best_s: dict[tuple[NodeView, ...], float] = {}

    def _region_of(self, peer: PeerId) -> int:
        return self._region.setdefault(peer, len(self._region) % self.scenario.ways.regions)

    def _make_nodes(self) -> list[SimulatedNode]:
        kinds = [kind for kind in self.scenario.nodes for _ in range(kind.count)]
        standing = set(self.rng.sample(range(len(kinds)), min(self.scenario.stand, len(kinds))))
        nodes = []
        for number, kind in enumerate(kinds):
            speed = 2 ** self.rng.uniform(-kind.spread, kind.spread)
            machine = self._machine(kind.machine, kind.cores)
            nodes.append(SimulatedNode(self.swarm, number, kind, machine, speed, number in standing))
        return nodes

    def _machine(self, name: str, cores: int) -> Machine:
        if not name:
            return Machine(self.loop, cores)
        return self._machines.setdefault(name, Machine(self.loop, cores))

    async def run(self) -> Outcome:
        """Everything, to the end."""
        scenario, outcome = self.scenario, self.outcome
        await self._bring_up()
        clients = scenario.clients
        self.clients = [
            SimulatedClient(self.swarm, self._machine(clients.machine, 1))
            for _ in range(1 if clients.together else clients.count)
        ]
        began_s = self.loop.time()
        until_s = began_s + scenario.duration_s
        faults = [*scenario.fault, *self._draw_faults()]
        for fault in faults:
            self._spawn(self._strike(fault, began_s))
        if scenario.churn.share_per_minute:
            self._spawn(self._churn(until_s))
        if scenario.optimum_every_s:
            self._spawn(self._watch(until_s))
        users = [
            keep_asking(
                self.clients[number % len(self.clients)],
                number,
                random.Random(self.rng.random()),
                until_s,
                outcome.answers,
            )
            for number in range(clients.count)
        ]
        await asyncio.gather(*users)
        await self._wind_up()
        return outcome

    async def _bring_up(self) -> None:
        """All nodes, those that choose for themselves one after the other, as they would come."""
        first: list[tuple[SimulatedNode, BlockRange]] = []
        self._began_s = self.loop.time()
        count = self.scenario.model.blocks
        throughput = [0.0] * count
        for node in self.nodes:
            if node.kind.joins_at_s > 0:
                self._spawn(self._join(node))
                continue
            if node.kind.blocks != "auto":
                blocks = BlockRange.parse(node.kind.blocks, count)
            else:
                blocks = weakest_range(throughput, node.most_blocks)
            for block in blocks:
                throughput[block] += 1 / node.block_time_s
            first.append((node, blocks))
        await asyncio.gather(*(node.start(blocks, loaded=True) for node, blocks in first))

    async def _join(self, node: SimulatedNode) -> None:
        await asyncio.sleep(node.kind.joins_at_s)
        await node.start()
        self.outcome.joined += 1

    def _draw_faults(self) -> list[Fault]:
        faults = self.scenario.faults
        return [
            Fault(
                at_s=self.rng.uniform(faults.from_s, faults.until_s),
                kind=self.rng.choice(faults.kinds),
                node=-1 if self.rng.random() < faults.aimed else self.rng.randrange(len(self.nodes)),
                for_s=self.rng.uniform(*faults.for_s),
                by_s=(JUMP_S, -JUMP_S)[number % 2],
            )
            for number in range(faults.count)
        ]

    async def _strike(self, fault: Fault, began_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + fault.at_s - self.loop.time()))
        if fault.node < 0:
            used = [node.number for node in self.nodes if node.alive and node.sessions()]
            fault = msgspec.structs.replace(fault, node=self.rng.choice(used or range(len(self.nodes))))
        node = self.nodes[fault.node]
        there = node.alive and node.server is not None
        self.outcome.struck.append(Struck(fault, node.sessions() if there else 0, there))
        if not there:
            return
        server, peer = node.server, node.peer
        assert server is not None
        assert peer is not None
        match fault.kind:
            case "crash":
                await node.crash()
                await asyncio.sleep(fault.for_s + RESTART_S)
                await node.start()
            case "leave":
                await node.leave()
                if fault.for_s < math.inf:
                    await asyncio.sleep(fault.for_s)
                    await node.start()
            case "freeze":
                self.swarm.network.freeze(peer)
                await asyncio.sleep(fault.for_s)
                self.swarm.network.sound(peer)
            case "slow":
                node.slowness = fault.factor
                if fault.for_s < math.inf:
                    await asyncio.sleep(fault.for_s)
                    node.slowness = 1.0
            case "lie":
                worker = server.worker
                assert isinstance(worker, FaultyWorker)
                worker.garbled = True
                await asyncio.sleep(fault.for_s)
                worker.garbled = False
            case "jump":
                node.clock.ahead_s = fault.by_s
                await asyncio.sleep(fault.for_s)
                node.clock.ahead_s = 0.0
            case "cut":
                await self._cut({peer}, fault.for_s)
            case "flap":
                end_s = self.loop.time() + fault.for_s
                while self.loop.time() < end_s and node.server is server:
                    await self._cut({peer}, FLAP_S)
                    await asyncio.sleep(FLAP_S)

    async def _cut(self, peers: set[PeerId], for_s: float) -> None:
        self._groups += 1
        group = self._groups
        self.swarm.shelves.part(peers, group)
        await asyncio.sleep(for_s)
        self.swarm.shelves.heal(peers, group)

    async def _churn(self, until_s: float) -> None:
        churn = self.scenario.churn
        per_s = churn.share_per_minute * len(self.nodes) / 60
        while True:
            await asyncio.sleep(self.rng.expovariate(per_s))
            if self.loop.time() >= until_s:
                return
            node = self.rng.choice(self.nodes)
            if node.alive and node.server is not None:
                self._spawn(self._replace(node))

    async def _replace(self, node: SimulatedNode) -> None:
        """A node goes, and another comes in its place."""
        self.outcome.left += 1
        await (node.leave() if self.rng.random() < self.scenario.churn.graceful else node.crash())
        await asyncio.sleep(RESTART_S)
        await node.start()
        self.outcome.joined += 1

    def _given_up(self, blocks: BlockRange, how: str) -> None:
        """A node takes no new sessions on a range because a plan said so: others have to, on every block of it.

        Who was told that others do may find them dead a moment later: that is their fault, not the plan's.
        """
        held = [there for node in self.nodes for there in node.holds()]
        gaps = [gap for gap in missing_blocks(held, self.scenario.model.blocks) if _meet(gap, blocks)]
        self.outcome.releases += 1
        if gaps and not self._dying:
            self.outcome.uncovered.append(f"{how}: nobody serves blocks {', '.join(map(str, gaps))}")

    @property
    def _dying(self) -> bool:
        """Whether nodes may end without a word."""
        scenario = self.scenario
        crash = any(fault.kind not in ("slow", "lie", "jump", "leave") for fault in scenario.fault)
        return bool(crash or scenario.faults.count or (scenario.churn.share_per_minute and scenario.churn.graceful < 1))

    def throughput(self) -> tuple[float, float]:
        """Tokens per second that the slowest stage lets through, as nodes hold their ranges now, and in the best layout
        of the same nodes: of those where each computes a stage alone (planning.exact), or where some share one, as far
        as a fresh search finds them."""
        scenario = self.scenario
        here = [node for node in self.nodes if node.alive and node.server is not None]
        snapshot = Snapshot(self.loop.unix_s(), tuple(node.view() for node in here))
        problem = chain_problem(snapshot, self.swarm.shape, cache_tokens=scenario.model.least_cache_tokens)
        held = {node.view().peer: tuple(node.holds()) for node in here}
        now_s = layout_cost(problem, held, THROUGHPUT).bottleneck_s
        if snapshot.nodes not in self._best_s:
            exact = solve_exactly(problem, THROUGHPUT, remaining_s=lambda: EXACT_S)
            if not exact.proven:
                raise BadOption(f"the best layout was not found within {EXACT_S:g} s; leave out optimum_every_s")
            plan = best_plan(snapshot, self.swarm.shape, THROUGHPUT, scenario.model.least_cache_tokens)
            self._best_s = {snapshot.nodes: min(exact.bound_s, plan.bottleneck_s)}  # of what follows one another
        return 1 / now_s, 1 / self._best_s[snapshot.nodes]

    async def _watch(self, until_s: float) -> None:
        while self.loop.time() < until_s:
            now, best = self.throughput()
            self.outcome.throughput.append((self.loop.time() - self._began_s, now, best))
            await asyncio.sleep(self.scenario.optimum_every_s)

    async def _wind_up(self) -> None:
        """Let everything end, and look whether anything is left of the sessions."""
        outcome = self.outcome
        outcome.repairs = sum(client.generator.repairs for client in self.clients)
        outcome.simulated_s = self.loop.time()
        await asyncio.gather(*self._tasks)  # what is cut off or frozen comes back
        await asyncio.sleep(FREED_S + SETTLE_S)
        outcome.leaks = [leak for node in self.nodes if (leak := node.leaks())]
        movers = [node.server.mover for node in self.nodes if node.server is not None]
        outcome.moves = sum(mover.moves for mover in movers if mover is not None)
        network = self.swarm.network
        outcome.plans = self.swarm.shelves.plans()
        outcome.bytes, outcome.frames, outcome.lost_frames = network.bytes, network.frames, network.lost
        for client in self.clients:
            await client.close()
        await asyncio.gather(*(node.crash() for node in self.nodes if node.alive))

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = self.loop.create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)


def _meet(one: BlockRange, other: BlockRange) -> bool:
    return one.start < other.end and other.start < one.end


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario. The same scenario brings the same outcome."""
    return run(lambda loop: World(loop, scenario).run())
