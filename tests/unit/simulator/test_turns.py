"""Many users on few places, in virtual time: everybody gets a turn, and the places are used."""

from __future__ import annotations

from collections import Counter

from bsns.simulator.scenario import Clients, Fault, Model, Nodes, Scenario, Ways
from bsns.simulator.world import Outcome, simulate

USERS = 16
PLACES = 5
DURATION_S = 30.0


def outcome(*faults: Fault, more: int = 0) -> Outcome:
    """Each user asks again as soon as an answer has ended, and a second after a refusal. `more`: stages held twice."""
    ranges = ["0:4", "4:8", "8:12"]
    return simulate(
        Scenario(
            name="turns",
            seed=3,
            duration_s=DURATION_S,
            model=Model(blocks=12, context_tokens=64),
            ways=Ways(round_trip_ms=40.0),
            nodes=tuple(
                Nodes(count=1, blocks=blocks, cache_tokens=PLACES * 64) for blocks in [*ranges, *ranges[:more]]
            ),
            clients=Clients(count=USERS, prompt_tokens=(16, 16), answer_tokens=(32, 48)),
            fault=faults,
        )
    )


def turns(told: Outcome) -> list[int]:
    whole = Counter(answer.client for answer in told.answers if answer.error is None)
    return [whole[user] for user in range(USERS)]


def test_every_user_gets_as_many_turns_as_the_others() -> None:
    told = outcome()
    assert not told.problems
    assert set(told.errors) <= {"CacheFull"}
    assert max(turns(told)) - min(turns(told)) <= 2, turns(told)


def test_and_when_a_stage_dies() -> None:
    told = outcome(Fault(at_s=8.0, kind="crash", node=0), more=1)
    assert not told.problems
    assert set(told.errors) <= {"CacheFull"}
    assert max(turns(told)) - min(turns(told)) <= 3, turns(told)
