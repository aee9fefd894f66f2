"""Whole swarms on virtual time under fault schedules drawn by lot; `bsns simulate --runs 1000` draws more of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bsns.simulator.report import report, to_json
from bsns.simulator.scenario import RANDOM_KINDS, parse_scenario
from bsns.simulator.world import simulate

ROOT = Path(__file__).parents[2]
SCENARIOS = ROOT / "benchmarks" / "scenarios"
BEFORE_JUMPS, SINCE_JUMPS = (
    [int(line) for line in (Path(__file__).parent / name).read_text().splitlines() if line[0] != "#"]
    for name in ("seeds.txt", "seeds_with_jumps.txt")
)
SEEDS = [*range(1000, 1012)]


@pytest.mark.parametrize("seed", [*BEFORE_JUMPS, *SINCE_JUMPS, *SEEDS])
def test_nothing_hangs_lies_or_leaks(seed: int) -> None:
    scenario = parse_scenario((SCENARIOS / "faults-50.toml").read_text(), seed=seed)
    if seed in BEFORE_JUMPS:  # their schedules were drawn before clocks could jump
        scenario = msgspec.structs.replace(
            scenario, faults=msgspec.structs.replace(scenario.faults, kinds=RANDOM_KINDS)
        )
    outcome = simulate(scenario)
    assert outcome.problems == []
    assert all(answer.right for answer in outcome.answers)
    struck = [one for one in outcome.struck if one.sessions]
    assert len(struck) >= len(outcome.struck) / 3, "most faults hit nobody"
    assert outcome.repairs


@pytest.mark.parametrize("seed", range(4))
def test_the_same_with_warm_spares(seed: int) -> None:
    outcome = simulate(parse_scenario((SCENARIOS / "faults-50-warm.toml").read_text(), seed=seed))
    assert outcome.problems == []
    assert all(answer.right for answer in outcome.answers)


def test_the_same_seed_gives_the_same_report_byte_by_byte() -> None:
    text = (SCENARIOS / "faults-50.toml").read_text()
    once, again, other = (to_json(report(simulate(parse_scenario(text, seed=seed)))) for seed in (7, 7, 8))
    assert once == again
    assert once != other
