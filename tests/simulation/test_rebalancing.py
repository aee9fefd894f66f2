"""Swarms that change: what they let through is soon near the best again, no block is uncovered, stragglers are left."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from running_time import running_s

from bsns.simulator.report import picture, report
from bsns.simulator.scenario import Clients, Fault, Model, Nodes, Scenario, Ways
from bsns.simulator.world import simulate

JOIN_S, LEAVE_S, SLOW_S, END_S = 70.0, 140.0, 210.0, 300.0


def test_after_a_join_a_leave_and_a_slowdown_nine_tenths_of_the_best_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsns.node.orchestrator.time", SimpleNamespace(monotonic=running_s))  # what plans may take
    scenario = Scenario(
        duration_s=END_S,
        plan_s=0.2,
        optimum_every_s=20.0,
        lease_s=20.0,
        model=Model(blocks=16),
        nodes=(
            Nodes(count=6, most_blocks=8, block_ms=4.0, spread=1.0),
            Nodes(count=1, most_blocks=10, block_ms=1.5, joins_at_s=JOIN_S),
        ),
        clients=Clients(count=2, prompt_tokens=(8, 32), answer_tokens=(32, 64), think_s=2.0, objective="throughput"),
        fault=(
            Fault(at_s=LEAVE_S, kind="leave", node=0, for_s=math.inf),
            Fault(at_s=SLOW_S, kind="slow", node=1, factor=4.0, for_s=math.inf),
        ),
    )
    outcome = simulate(scenario)
    assert outcome.problems == []
    assert outcome.releases, "nobody moved"
    assert outcome.errors == {}
    shares = {at_s: now / best for at_s, now, best in outcome.throughput}
    for end_s in (JOIN_S, LEAVE_S, SLOW_S, END_S):
        settled = [share for at_s, share in shares.items() if end_s - 21.0 < at_s < end_s]
        assert settled, shares
        assert min(settled) >= 0.9, shares


def test_a_stage_that_becomes_slow_is_left_though_its_steps_are_never_overdue() -> None:
    """At 0.6 s a step a client that only waits for what is overdue would stay for ever."""
    scenario = Scenario(
        duration_s=8.0,
        model=Model(blocks=12),
        nodes=tuple(Nodes(count=2, blocks=blocks, block_ms=2.0) for blocks in ("0:4", "4:8", "8:12")),
        clients=Clients(answer_tokens=(200, 200)),
        fault=(Fault(at_s=2.0, kind="slow", factor=75.0, for_s=math.inf),),
    )
    outcome = simulate(scenario)
    assert outcome.problems == []
    assert outcome.struck[0].sessions == 1
    assert outcome.repairs == 1
    answer = outcome.answers[0]
    assert len(answer.tokens) == 200
    assert answer.ended_s - answer.asked_s < 15, "0.6 s a token would take two minutes"
    figures = report(outcome)
    assert figures["faults"] == {"slow": {"injected": 1, "struck": 1}}
    assert picture(outcome).startswith(b"<?xml")


def _in_pairs(*faults: Fault) -> Scenario:
    """Three stages, of which each could be computed by a quicker node, 0, 2 or 4, or by a slower one."""
    pairs = [
        Nodes(count=1, blocks=blocks, block_ms=block_ms) for blocks in ("0:4", "4:8", "8:12") for block_ms in (2.0, 3.0)
    ]
    return Scenario(
        duration_s=4.0,
        model=Model(blocks=12),
        nodes=tuple(pairs),
        clients=Clients(answer_tokens=(100, 100)),
        fault=faults,
    )


def test_a_stage_that_was_slow_before_the_answer_began_is_left() -> None:
    """It is no slower than it was, but much slower than its node says."""
    outcome = simulate(_in_pairs(Fault(at_s=0.0, kind="slow", node=2, factor=75.0, for_s=math.inf)))
    assert outcome.problems == []
    assert outcome.repairs >= 1
    answer = outcome.answers[0]
    assert len(answer.tokens) == 100
    assert answer.ended_s - answer.asked_s < 10, "0.6 s a token would take a minute"


def test_a_neighbour_that_freezes_while_a_stage_dies_does_not_hold_up_the_repair() -> None:
    outcome = simulate(
        _in_pairs(
            Fault(at_s=1.0, kind="crash", node=2, for_s=60.0),
            Fault(at_s=1.0, kind="freeze", node=4, for_s=60.0),
        )
    )
    assert outcome.problems == []
    assert [one.sessions for one in outcome.struck] == [1, 1]
    assert outcome.answers[0].gap_s < 1.5, "the frozen one is asked whether it is there while the dead one is replaced"


def test_a_long_prompt_over_a_slow_way_is_nobodys_fault() -> None:
    """A second and a half a chunk: longer than a stage may be silent, were it not for what is seen to leave."""
    scenario = Scenario(
        duration_s=3.0,
        model=Model(blocks=12, hidden_bytes=4096, context_tokens=2048),
        ways=Ways(round_trip_ms=20.0, mbit=2.8),
        nodes=tuple(Nodes(count=2, blocks=blocks, block_ms=2.0, cache_tokens=4096) for blocks in ("0:6", "6:12")),
        clients=Clients(prompt_tokens=(1024, 1024), answer_tokens=(10, 10)),
    )
    outcome = simulate(scenario)
    assert outcome.problems == []
    assert outcome.errors == {}
    assert outcome.repairs == 0


def test_where_nothing_comes_the_user_is_told_in_time() -> None:
    scenario = Scenario(
        duration_s=3.0,
        model=Model(blocks=2),
        nodes=(Nodes(count=1),),
        clients=Clients(deadline_s=1.0, answer_tokens=(50, 50)),
        fault=(Fault(at_s=0.5, kind="slow", factor=1e6, for_s=math.inf),),
    )
    outcome = simulate(scenario)
    assert outcome.errors, "nothing came back in time, and nobody was told"
    assert all(answer.silence_s < 1.0 + 5.0 for answer in outcome.answers)
