"""Scenario files: whatever is wrong with one is said in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsns.core.errors import BadOption, BadRange
from bsns.simulator.scenario import parse_scenario

SCENARIOS = Path(__file__).parents[3] / "benchmarks" / "scenarios"
NODES = "[[nodes]]\ncount = 3\n"


def test_every_scenario_of_the_project_is_one() -> None:
    files = sorted(SCENARIOS.glob("*.toml"))
    assert len(files) >= 4
    for file in files:
        assert parse_scenario(file.read_text(), seed=5).seed == 5


def test_a_clock_may_jump_back() -> None:
    text = NODES + "[[fault]]\nat_s = 1.0\nkind = 'jump'\nby_s = -3600.0\n"
    assert parse_scenario(text).fault[0].by_s == -3600


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nodes"),
        ("nonsense", "no scenario"),
        ("[[nodes]]\ncount = 0\n", "1 to 20000 nodes"),
        ("[[nodes]]\ncount = 100000\n", "1 to 20000 nodes"),
        (NODES + "block_ms = 0\n", "take time"),
        (NODES + "colour = 1\n", "colour"),
        ("duration_s = -1\n" + NODES, "duration_s"),
        ("duration_s = nan\n" + NODES, "duration_s"),
        ("[ways]\nround_trip_ms = nan\n" + NODES, "round_trip_ms"),
        ("[churn]\nshare_per_minute = inf\n" + NODES, "share_per_minute"),
        ("[churn]\ngraceful = 2.0\n" + NODES, "shares"),
        (NODES + "spread = 2000.0\n", "spread"),
        (NODES + "joins_at_s = -3.0\n", "joins_at_s"),
        (NODES + "blocks = '99:100'\n", "99:100"),
        (NODES + "[faults]\nfrom_s = 9.0\nuntil_s = 2.0\n", "begin before"),
        (NODES + "[faults]\nkinds = []\n", "some kind"),
        (NODES + "[[fault]]\nat_s = 1.0\nkind = 'crash'\nfor_s = inf\n", "for ever"),
        (NODES + "[ways]\nmbit = 0\n", "Mbit"),
        (NODES + "[ways]\nloss = 1.0\n", "loss"),
        (NODES + "[clients]\nanswer_tokens = [9, 3]\n", "a least and a most"),
        (NODES + "[clients]\nanswer_tokens = [9, 9000]\n", "context"),
        (NODES + "[[fault]]\nat_s = 1.0\nkind = 'crash'\nnode = 3\n", "a fault's node"),
        (NODES + "[[fault]]\nat_s = 1.0\nkind = 'explode'\n", "explode"),
        (NODES + "[[fault]]\nat_s = 1.0\nkind = 'jump'\nby_s = -inf\n", "by_s"),
        (NODES + "[[fault]]\nat_s = 1.0\nkind = 'jump'\nfor_s = inf\n", "for ever"),
        (NODES + "[faults]\nkinds = ['explode']\n", "explode"),
        ("lease_s = 0\n" + NODES, "lease_s"),
    ],
)
def test_a_scenario_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises((BadOption, BadRange), match=said):
        parse_scenario(text)
