"""Orchestrators over one directory and a clock of our own: who plans, what is in force, and what if nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import NotAMember, NotEnoughMemory, PeerFailed
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective, Plan, PlannedStage
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.node.orchestrator import Orchestrator
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.directory import MemoryDirectory, Reading
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership
from bsns.swarm.plans import ranges_of

MODEL = ModelId("m")
SHAPE = ModelShape(MODEL, "tiny", (100,) * 6, 1, 1000, dtype="float32")
LEASE_S = 20.0
START_S = 1_800_000_000.0


@dataclass
class Node:
    """A node as the orchestrator sees it, its clock, and what it was told."""

    orchestrator: Orchestrator
    peer: PeerId
    wake_s: float
    clock: HandClock
    plan: PlanRecord | None = None
    told: int = 0
    alive: bool = True


@dataclass
class HandClock:
    """A world's time."""

    world: World
    ahead_s: float = 0.0

    def now_s(self) -> float:
        return self.world.now_s

    def unix_s(self) -> float:
        return self.world.now_s + self.ahead_s


@dataclass
class World:
    """Nodes that look in turn on a virtual clock, and a planner whose answer a test writes down."""

    now_s: float = START_S
    founder: Founder = field(default_factory=Founder.found)
    nodes: dict[PeerId, Node] = field(default_factory=dict)
    answer: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    searches: int = 0

    def __post_init__(self) -> None:
        self.directory = MemoryDirectory(clock=lambda: self.now_s)

    def plan(self, view: Snapshot, shape: ModelShape, objective: Objective, cache_tokens: int) -> Plan:
        self.searches += 1
        if not self.answer:
            raise NotEnoughMemory("nothing fits")
        stages = tuple(PlannedStage(BlockRange(*blocks), peer, 0.0, 0.0) for peer, blocks in self.answer.items())
        return Plan(MODEL, "tiny", shape.block_count, objective, stages, (), 1.0, 1.0, 0.5, 1.0, "known")

    def add(self, start: int, end: int, *, stands: bool = True) -> Node:
        identity = Identity.draw()
        membership = Membership.of_founder(self.founder, identity, self.now_s)
        peer = identity.peer

        def obey(plan: PlanRecord | None, records: Sequence[NodeRecord], read_s: float) -> None:
            node.plan, node.told = plan, node.told + 1

        def stand(draw: bytes) -> None:
            self.directory.shelf[peer] = msgspec.structs.replace(self.directory.shelf[peer], draw=draw)

        clock = HandClock(self)
        orchestrator = Orchestrator(
            *(self.directory, membership, SHAPE),
            obey=obey,
            stand=stand,
            stands=stands,
            lease_s=LEASE_S,
            planner=self.plan,
            clock=clock,
        )
        node = self.nodes[peer] = Node(orchestrator, peer, self.now_s, clock)
        self.directory.shelf[peer] = NodeRecord(
            *(peer, (), MODEL, "tiny", 6, start, end, "serving", "cpu", "float32", "torch", 1),
            *(4096, 4096, 0.1, 1, "0", 0.0, self.now_s + 600),
            memory_bytes=10_000,
            follows=True,
        )
        return node

    async def run(self, seconds: float, *, at_most: int = 1) -> None:
        """Let everybody look when it is their turn; searches take no time. So many act at once at most."""
        until_s = self.now_s + seconds
        while True:
            living = [node for node in self.nodes.values() if node.alive]
            node = min(living, key=lambda node: node.wake_s)
            if node.wake_s >= until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, node.wake_s)
            await node.orchestrator.look()
            if node.orchestrator._search is not None:
                await node.orchestrator._search
            election = node.orchestrator.election
            node.wake_s = self.now_s + min(max(election.wake_s - node.clock.unix_s(), 0.02), election.renew_s)
            assert len(self.acting()) <= at_most

    def acting(self) -> list[Node]:
        """By their own clocks."""
        return [n for n in self.nodes.values() if n.alive and n.orchestrator.election.acts(n.clock.unix_s())]

    def move(self) -> None:
        """All obey at once."""
        for peer, node in self.nodes.items():
            blocks = ranges_of(node.plan).get(peer) if node.plan is not None else None
            if blocks is not None:
                record = self.directory.shelf[peer]
                self.directory.shelf[peer] = msgspec.structs.replace(record, start=blocks.start, end=blocks.end)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for node in world.nodes.values():
        if node.orchestrator._search is not None:
            node.orchestrator._search.cancel()


def split(world: World) -> dict[PeerId, tuple[int, int]]:
    one, other = list(world.nodes)[:2]
    return {one: (0, 3), other: (3, 6)}


async def test_one_is_elected_and_says_that_things_stay(world: World) -> None:
    for start, end in ((0, 3), (3, 6), (0, 3)):
        world.add(start, end)
    world.answer = split(world)
    await world.run(LEASE_S)
    assert world.searches == 0  # nothing is missing: the first plan can wait
    await world.run(LEASE_S)
    (holder,) = world.acting()
    plans = {node.plan for node in world.nodes.values()}
    assert len(plans) == 1
    (plan,) = plans
    assert plan is not None
    assert (plan.author, plan.term, plan.version) == (holder.peer, 1, 1)
    assert set(ranges_of(plan)) == set(world.nodes)
    assert world.searches >= 1


async def test_a_plan_worth_moving_for_gets_a_new_version_and_then_things_stay(world: World) -> None:
    world.add(0, 5)
    world.add(5, 6)
    await world.run(LEASE_S)  # no plan is possible yet: a lease without one
    assert all(node.plan is not None and node.plan.version == 0 for node in world.nodes.values())
    world.answer = split(world)
    await world.run(2 * LEASE_S)
    plan = next(iter(world.nodes.values())).plan
    assert plan is not None
    assert plan.version == 1
    assert {peer: (r.start, r.end) for peer, r in ranges_of(plan).items()} == world.answer
    world.move()
    searched = world.searches
    await world.run(13 * LEASE_S)
    assert searched + 2 <= world.searches <= searched + 4  # while nothing changes it looks seldom
    assert {node.plan.version for node in world.nodes.values() if node.plan is not None} == {1}
    assert all(node.plan is not None and node.plan.expires_s > world.now_s for node in world.nodes.values())


async def test_the_next_orchestrator_goes_on_with_the_plan_of_the_last(world: World) -> None:
    for start, end in ((0, 5), (5, 6), (0, 6)):
        world.add(start, end)
    world.answer = split(world)
    await world.run(2 * LEASE_S)
    (holder,) = world.acting()
    before = next(iter(world.nodes.values())).plan
    assert before is not None
    holder.alive = False
    killed_s = world.now_s
    while not world.acting():
        await world.run(0.5)
        assert world.now_s - killed_s < 2 * LEASE_S
    await world.run(2 * LEASE_S)
    (successor,) = world.acting()
    plan = successor.plan
    assert plan is not None
    assert (plan.term, plan.version) == (2, 1)
    assert plan.assignments == before.assignments  # which nobody has followed yet: it did not take what is held instead
    assert successor.peer != holder.peer


async def test_without_an_orchestrator_no_plan_is_in_force(world: World) -> None:
    world.add(0, 6)
    watcher = world.add(0, 6, stands=False)
    world.answer = {watcher.peer: (0, 6)}
    await world.run(2 * LEASE_S)
    assert watcher.plan is not None
    next(iter(world.nodes.values())).alive = False
    await world.run(2 * LEASE_S)
    assert watcher.plan is None
    assert world.acting() == []


async def test_whoever_never_stands_is_never_elected(world: World) -> None:
    world.add(0, 6, stands=False)
    await world.run(3 * LEASE_S)
    assert world.acting() == []
    assert world.directory.plan_shelf == {}


async def test_a_holder_whose_leases_are_not_stored_stops_acting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = world.add(0, 6)
    await world.run(5.0)
    assert node.orchestrator.election.acts(world.now_s)

    async def refuse(plan: PlanRecord) -> None:
        raise PeerFailed("nobody took our record")

    monkeypatch.setattr(world.directory, "publish_plan", refuse)
    refused = 0
    for _ in range(8):
        world.now_s += LEASE_S / 6
        try:
            await node.orchestrator.look()
        except PeerFailed:
            refused += 1
    assert refused >= 2
    assert not node.orchestrator.election.acts(world.now_s)


async def test_models_and_dtypes_are_governed_apart(world: World) -> None:
    node = world.add(0, 6)
    await world.run(5.0)
    (lease,) = world.directory.plan_shelf.values()
    alien = msgspec.structs.replace(lease, author=Identity.draw().peer, dtype="bfloat16", term=9)
    world.directory.plan_shelf[alien.author] = alien
    await world.run(5.0)
    assert node.orchestrator.election.acts(world.now_s)


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
async def test_an_orchestrator_alone_whose_clock_was_wrong_governs_on(world: World, ahead_s: float) -> None:
    node = world.add(0, 6)
    await world.run(2 * LEASE_S)
    node.clock.ahead_s = ahead_s
    await world.run(2 * LEASE_S)
    node.clock.ahead_s = 0.0
    await world.run(3 * LEASE_S)
    assert node.orchestrator.election.acts(world.now_s)
    (lease,) = await world.directory.plans()
    assert world.now_s < lease.expires_s <= world.now_s + LEASE_S, "nobody who comes sees that somebody governs"
    searched = world.searches
    await world.run(7 * LEASE_S)
    assert world.searches > searched, "it plans no more"


async def test_whoever_is_refused_does_not_ask_again_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = world.add(0, 6)
    await world.run(5.0)
    refused: list[int] = []

    async def refuse() -> Reading:
        refused.append(1)
        raise NotAMember("the clocks differ by 3600 s; set them right")

    monkeypatch.setattr(world.directory, "records", refuse)
    world.now_s += 3600
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    task = asyncio.create_task(node.orchestrator.run())
    await asyncio.sleep(0.2)
    task.cancel()
    assert len(refused) <= 1 + (loop.time() - began_s) / node.orchestrator.election.step_s


async def test_after_an_hour_of_its_own_a_node_obeys_the_others_plan_again(world: World) -> None:
    """By a clock far ahead it was alone, and claimed terms that nobody else has heard of."""
    for start, end in ((0, 5), (5, 6), (0, 6)):
        world.add(start, end)
    world.answer = split(world)
    await world.run(3 * LEASE_S)
    node = next(node for node in world.nodes.values() if node not in world.acting())
    common, node.orchestrator._directory = world.directory, MemoryDirectory(clock=node.clock.unix_s)
    node.clock.ahead_s = 3600.0
    alone = msgspec.structs.replace(common.shelf[node.peer], expires_s=node.clock.unix_s() + 600)
    await node.orchestrator._directory.publish(alone)
    for _ in range(10):
        await world.run(LEASE_S / 3, at_most=2)
    assert node.plan is not None
    assert node.plan.author == node.peer
    node.clock.ahead_s = 0.0
    node.orchestrator._directory = common
    await world.run(LEASE_S / 3 + 0.1, at_most=2)  # until it has looked
    await world.run(2 * LEASE_S)
    (holder,) = world.acting()
    assert node.plan is not None
    assert node.plan.author == holder.peer
    assert len({(n.plan.term, n.plan.version) for n in world.nodes.values() if n.plan is not None}) == 1
