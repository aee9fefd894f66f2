"""Elections among nodes that come, crash, leave and freeze, over a directory that is slow: safety and liveness."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.ids import PeerId
from bsns.swarm.election import Claim, Election, Lease, Seen, Stand, Stored

LEASE_S = 20.0
START_S = 1e6


def own_draw(peer: PeerId, term: int) -> bytes:
    return hashlib.sha256(f"{peer}/{term}".encode()).digest()


def lot_of(peer: PeerId, term: int, drawn: bytes) -> bytes | None:
    return drawn if drawn == own_draw(peer, term) else None


@dataclass
class Node:
    election: Election
    wake_s: float
    alive: bool = True


@dataclass
class World:
    """Nodes on a virtual clock. What they store can be read `delay` later, at most `slow_s`."""

    rng: random.Random
    slow_s: float
    now_s: float = START_S
    nodes: dict[PeerId, Node] = field(default_factory=dict)
    leases: dict[PeerId, Lease] = field(default_factory=dict)
    draws: dict[PeerId, bytes] = field(default_factory=dict)
    under_way: list[tuple[float, PeerId, Lease | bytes]] = field(default_factory=list)
    elected: int = 0

    def join(self) -> None:
        peer = PeerId(f"node-{len(self.nodes)}")
        election = Election(peer, lambda term: own_draw(peer, term), lot_of, lease_s=LEASE_S, stands=True)
        self.nodes[peer] = Node(election, self.now_s)
        self.draws[peer] = b""

    def acting(self) -> list[PeerId]:
        return [peer for peer, node in self.nodes.items() if node.alive and node.election.acts(self.now_s)]

    def run(self, until_s: float) -> None:
        """Let everything happen in order of time, looking at each moment whether two act."""
        while True:
            wakes = [(node.wake_s, peer) for peer, node in self.nodes.items() if node.alive]
            stores = [(at_s, number) for number, (at_s, _, _) in enumerate(self.under_way)]
            if min([*stores, *wakes, (until_s, 0)], key=lambda entry: entry[0])[0] >= until_s:
                self.now_s = until_s
                return
            if stores and (not wakes or min(stores)[0] <= min(wakes)[0]):
                self.now_s, number = min(stores)
                self._stored(*self.under_way.pop(number)[1:])
            else:
                self.now_s, peer = min(wakes)
                self._look(peer)
            for node in self.nodes.values():
                node.election.check()

    def _stored(self, peer: PeerId, what: Lease | bytes) -> None:
        if isinstance(what, bytes):
            if peer in self.draws:
                self.draws[peer] = what
            return
        self.leases[peer] = what
        node = self.nodes[peer]
        if node.alive:
            node.election.handle(Stored(what), self.now_s)
            node.wake_s = max(node.election.wake_s, self.now_s)

    def _look(self, peer: PeerId) -> None:
        node = self.nodes[peer]
        leases = [lease for lease in self.leases.values() if lease.expires_s > self.now_s]
        stored_s = self.now_s
        for action in node.election.handle(Seen(leases, dict(self.draws)), self.now_s):
            match action:
                case Claim(lease):
                    stored_s = self.now_s + self.rng.uniform(0, self.slow_s)
                    self.under_way.append((stored_s, peer, lease))
                case Stand(term):
                    at_s = self.now_s + self.rng.uniform(0, self.slow_s)
                    self.under_way.append((at_s, peer, own_draw(peer, term)))
        # as a node does: it waits for its store to end, then until the election wants to look
        node.wake_s = max(node.election.wake_s, stored_s, self.now_s + 0.02)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["join", "crash", "leave", "freeze", "wait"]), st.floats(0, 3 * LEASE_S)), max_size=12
)


@settings(max_examples=120)
@given(EVENTS, st.integers(1, 5), st.randoms(use_true_random=False), st.floats(0.0, 0.9))
def test_never_two_act_and_somebody_soon_does(
    events: list[tuple[str, float]], nodes: int, rng: random.Random, slow_steps: float
) -> None:
    """Where storing takes less than a step, never two act at once; and two leases after any event one does."""
    step_s = LEASE_S / 20
    world = World(rng, slow_steps * step_s)
    for _ in range(nodes):
        world.join()
    for event, wait_s in [*events, ("wait", 0.0)]:
        living = [peer for peer, node in world.nodes.items() if node.alive and node.wake_s < START_S * 2]
        acting = world.acting()
        chosen = acting[0] if acting and rng.random() < 0.7 else rng.choice(living) if living else None
        match event:
            case "join":
                world.join()
            case "crash" if chosen is not None:
                world.nodes[chosen].alive = False
            case "leave" if chosen is not None:
                world.nodes[chosen].alive = False
                del world.draws[chosen]
            case "freeze" if chosen is not None:
                world.nodes[chosen].wake_s += wait_s  # sleeps through its turns, and then goes on where it was
        end_s = world.now_s + wait_s
        while world.now_s < end_s:
            world.run(min(end_s, world.now_s + step_s / 2))
            assert len(world.acting()) <= 1
    world.run(
        world.now_s + 2 * LEASE_S + max((n.wake_s - world.now_s for n in world.nodes.values() if n.alive), default=0)
    )
    assert len(world.acting()) == (1 if any(node.alive for node in world.nodes.values()) else 0)


@settings(max_examples=60)
@given(st.integers(2, 6), st.randoms(use_true_random=False), st.floats(0, LEASE_S))
def test_a_killed_orchestrator_is_replaced_within_two_leases(nodes: int, rng: random.Random, after_s: float) -> None:
    world = World(rng, LEASE_S / 40)
    for _ in range(nodes):
        world.join()
    world.run(START_S + LEASE_S + after_s)
    (holder,) = world.acting()
    world.nodes[holder].alive = False
    killed_s = world.now_s
    while not world.acting():
        world.run(world.now_s + 0.1)
        assert world.now_s < killed_s + 2 * LEASE_S
    assert world.nodes[world.acting()[0]].election.term == world.nodes[holder].election.term + 1


@settings(max_examples=60)
@given(st.integers(2, 5), st.randoms(use_true_random=False), st.floats(1.0, 9.0))
def test_over_a_slow_directory_all_agree_once_they_have_heard_each_other(
    nodes: int, rng: random.Random, slow_steps: float
) -> None:
    """Two may act for a moment if storing takes longer than a step; not after their leases and looks have crossed."""
    world = World(rng, slow_steps * LEASE_S / 20)
    for _ in range(nodes):
        world.join()
    world.run(START_S + 3 * LEASE_S)
    holders = {node.election.holder(world.now_s) for node in world.nodes.values()}
    assert len({holder.holder for holder in holders if holder is not None}) == 1
    assert len(world.acting()) == 1
