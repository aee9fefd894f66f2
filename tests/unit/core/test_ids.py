"""Peers as people tell them apart."""

from __future__ import annotations

from bsns.core.ids import PeerId, short, short_names


def names(*peers: str) -> list[str]:
    found = short_names(PeerId(peer) for peer in peers)
    return [found[PeerId(peer)] for peer in peers]


def test_a_long_id_is_cut_and_a_short_name_is_not() -> None:
    assert [short(PeerId(peer)) for peer in ("a", "node-0001", "node-00001")] == ["a", "node-0001", "…de-00001"]


def test_in_one_listing_no_two_are_called_the_same() -> None:
    assert names("a", "12D3KooWabcdefgh", "12D3KooWabcdefgi") == ["a", "…abcdefgh", "…abcdefgi"]
    assert names("aaaaaaaa-office-1", "bbbbbbbb-office-1", "x" * 30) == [
        "…a-office-1",
        "…b-office-1",
        "…xxxxxxxx",
    ]
    assert names("1-office-1", "2-office-1") == ["1-office-1", "2-office-1"]
    assert names("office-1", "aaaaaaaa-office-1") == ["office-1", "…-office-1"]
    assert names("", "a", "a") == ["", "a", "a"]
