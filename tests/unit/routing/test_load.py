"""How loaded nodes are: what records tell, and our own sessions."""

from __future__ import annotations

from test_chain import record

from bsns.routing.load import Loads, slowdown


def test_a_further_row_costs_a_quarter_of_the_first() -> None:
    assert [slowdown(sessions) for sessions in (0, 1, 4)] == [1.0, 1.25, 2.0]


def test_records_count_ours_once() -> None:
    loads = Loads()
    a, b = record("a", 0, 6), record("b", 0, 6, sessions=3)
    loads.see([a, b])
    assert loads.sessions() == {"a": 0, "b": 3}
    loads.add([a.peer, b.peer])
    loads.add([a.peer])
    assert loads.sessions() == {"a": 2, "b": 4}
    loads.see([a, b])  # the same records as before
    assert loads.sessions() == {"a": 2, "b": 4}
    loads.see([record("a", 0, 6, sessions=2), record("b", 0, 6, sessions=6)])  # two of these and one of those are ours
    assert loads.sessions() == {"a": 2, "b": 6}
    loads.remove([a.peer, b.peer])
    assert loads.sessions() == {"a": 1, "b": 5}
    loads.see([])
    assert loads.sessions() == {"a": 1}


def test_an_end_without_a_beginning_changes_nothing() -> None:
    loads = Loads()
    loads.see([record("a", 0, 6)])
    loads.remove([record("a", 0, 6).peer])
    assert loads.sessions() == {"a": 0}
