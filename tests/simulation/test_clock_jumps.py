"""Clocks that jump: answers go on and are right, no block is uncovered, and whoever was left out comes back."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bsns.core.ids import PeerId
from bsns.node.server import ANNOUNCE_S
from bsns.simulator.clock import VirtualLoop, run
from bsns.simulator.report import report, to_json
from bsns.simulator.scenario import Clients, Fault, Model, Nodes, Scenario
from bsns.simulator.world import Outcome, World, simulate

HOUR_S = 3600.0
FIRST_S, EACH_S, WRONG_S = 20.0, 140.0, 100.0
"""When the first clock jumps, how long after it the next, and how long each is wrong: longer than a record lives."""
NODES = 3
BACK_S = ANNOUNCE_S + 3.0
END_S = FIRST_S + NODES * EACH_S + 40.0


def scenario(by_s: float) -> Scenario:
    """The clock of every node jumps, one after the other, so that the orchestrator's does too."""
    return Scenario(
        duration_s=END_S,
        model=Model(blocks=12),
        nodes=(Nodes(count=NODES, most_blocks=8, block_ms=2.0, spread=1.0),),
        clients=Clients(count=2, prompt_tokens=(8, 32), answer_tokens=(16, 32), think_s=4.0),
        fault=tuple(
            Fault(at_s=FIRST_S + number * EACH_S, kind="jump", node=number, for_s=WRONG_S, by_s=by_s)
            for number in range(NODES)
        ),
    )


def watched(by_s: float) -> tuple[Outcome, list[tuple[PeerId, set[PeerId], set[PeerId]]]]:
    """The outcome, and for each jump who jumped, and who was in the directory at its end and soon after."""

    async def main(loop: VirtualLoop) -> tuple[Outcome, list[tuple[PeerId, set[PeerId], set[PeerId]]]]:
        world = World(loop, scenario(by_s))
        simulating = asyncio.create_task(world.run())
        seen = []

        async def here() -> set[PeerId]:
            shelf = world.swarm.shelves.of(PeerId("an onlooker"))
            return {record.peer for record in await shelf.records() if record.state == "serving"}

        for number in range(NODES):
            await asyncio.sleep(FIRST_S + number * EACH_S + WRONG_S - 0.5 - loop.time())
            at_the_end = await here()
            await asyncio.sleep(BACK_S)
            peer = world.nodes[number].peer
            assert peer is not None
            seen.append((peer, at_the_end, await here()))
        await asyncio.sleep(END_S - 5.0 - loop.time())
        offices = [office for node in world.nodes if node.server and (office := node.server.orchestrator)]
        assert sum(office.election.acts(loop.unix_s()) for office in offices) == 1, "nobody governs, or two do"
        plans = {(plan.author, plan.term, plan.version) if plan else None for plan in (o.plan for o in offices)}
        assert len(plans) == 1, "not all obey the same plan"
        assert None not in plans
        return await simulating, seen

    return run(main)


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S])
def test_a_node_whose_clock_is_wrong_is_passed_over_until_it_is_right(by_s: float) -> None:
    outcome, seen = watched(by_s)
    assert outcome.problems == []
    assert set(outcome.errors) <= {"MissingBlocks"}, "it is as if a node had gone"
    assert outcome.errors.total() <= 4, "until a plan without it is in force"
    assert all(answer.right for answer in outcome.answers)
    assert sum(one.happened for one in outcome.struck) == NODES
    for peer, at_the_end, later in seen:
        assert peer not in at_the_end
        assert peer in later, "it did not come back by itself"


@pytest.mark.parametrize("by_s", [40.0, -40.0])
def test_clocks_that_differ_by_less_than_the_spare_life_of_a_record_leave_nobody_out(by_s: float) -> None:
    outcome, seen = watched(by_s)
    assert outcome.problems == []
    assert outcome.errors == {}
    assert all(peer in at_the_end and peer in later for peer, at_the_end, later in seen)


def test_jumps_are_the_same_byte_by_byte() -> None:
    brief = msgspec.structs.replace(scenario(-HOUR_S), duration_s=25.0)
    brief = msgspec.structs.replace(brief, fault=(msgspec.structs.replace(brief.fault[0], at_s=2.0, for_s=15.0),))
    once, again = (to_json(report(simulate(brief))) for _ in range(2))
    assert once == again
    assert b'"jump"' in once
