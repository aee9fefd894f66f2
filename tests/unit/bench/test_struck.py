"""What struck answers have cost, from what nodes and streams say; nothing is struck here."""

from __future__ import annotations

from bsns.bench.struck import STRIKES_AFTER, Cell, Outcome, recomputed, table
from bsns.bench.survive import PLACES, merge, ranges_of
from bsns.core.blocks import missing_blocks
from bsns.core.ids import PeerId

A, B, SPARE = (PeerId(name) for name in ("a", "b", "spare"))
PROMPT, TOKENS = 100, 40
ONCE = PROMPT + TOKENS - 1
OUTCOME = Outcome([1] * TOKENS, 0.1, None, 1, 0, (A, B))


def test_an_undisturbed_answer_computes_nothing_twice() -> None:
    before, after = {A: 7, B: 0, SPARE: 50}, {A: 7 + ONCE, B: ONCE, SPARE: 50}
    assert recomputed(before, after, OUTCOME, (), PROMPT) == 0


def test_a_spare_computes_again_what_was_there_when_the_fault_struck() -> None:
    before, after = {A: 0, B: 0, SPARE: 50}, {A: ONCE, B: 12345, SPARE: 50 + ONCE}
    assert recomputed(before, after, OUTCOME, {B}, PROMPT) == PROMPT + STRIKES_AFTER


def test_a_stage_that_stays_may_be_sent_things_again() -> None:
    assert recomputed({A: 0}, {A: ONCE + 3}, OUTCOME, {B}, PROMPT) == 3


def test_an_answer_that_broke_off_early() -> None:
    early = Outcome([1] * 3, 0.1, "PeerLost", 0, 0, (A, B))
    assert recomputed({}, {A: PROMPT + 2, SPARE: 0}, early, {B}, PROMPT) == 0


def test_cells_become_figures() -> None:
    cells = {("kill", "first"): Cell(0.25, True, True, 1, 0, 256), ("kill", "last"): Cell(0.5, False, True, 2, 0, 512)}
    figures = table(cells)
    assert figures["gap_ms"] == {"kill": {"first": 250.0, "last": 500.0}}
    assert figures["exact"]["kill"] == {"first": True, "last": False}
    assert figures["recomputed"]["kill"]["last"] == 512
    merge(
        figures,
        table({("cut", "first"): Cell(1.0, True, False, 1, 0, 0), ("kill", "bootstrap"): Cell(0, True, True, 0, 0, 0)}),
    )
    assert figures["freed"] == {"kill": {"first": True, "last": True, "bootstrap": True}, "cut": {"first": False}}


def test_places_are_stages_of_the_route() -> None:
    struck = {name: place(4) for name, place in PLACES.items()}
    assert struck == {"first": [0], "middle": [2], "last": [3], "double": [0, 3], "adjacent": [1, 2]}


def test_every_range_has_two_holders_and_no_route_is_shorter() -> None:
    ranges = ranges_of(30)
    assert len(ranges) == 8
    assert not missing_blocks(ranges[:4], 30)
    assert ranges[:4] == ranges[4:]
