"""The error tree: drawn as it is, each kind with a remedy, and the same after a walk over the wire."""

from __future__ import annotations

import re

import pytest

from bsns.core import errors
from bsns.core.errors import ERRORS, BsnsError, PeerError, PeerFailed, PeerLost, Remedy, error_from_wire
from bsns.core.ids import PeerId

BRANCHES = {
    "UserError": Remedy.TELL_USER,
    "SwarmError": Remedy.WAIT,
    "PeerError": Remedy.OTHER_PEER,
    "SessionError": Remedy.REPLAY,
    "ProtocolError": Remedy.BAN,
}


def test_the_docstring_draws_the_tree_that_is() -> None:
    drawing = (errors.__doc__ or "").partition("BsnsError\n")[2].partition("A failure crosses")[0]
    assert set(re.findall(r"[A-Z]\w+[a-z]\w+", drawing)) == set(ERRORS)


@pytest.mark.parametrize("kind", ERRORS.values())
def test_each_kind_says_what_it_is_and_what_to_do(kind: type[BsnsError]) -> None:
    branch = kind.__mro__[-5]  # below it BsnsError, Exception, BaseException and object
    assert kind.remedy is BRANCHES[branch.__name__]
    assert kind.__doc__
    assert kind.__doc__.endswith(".")


@pytest.mark.parametrize("kind", ERRORS.values())
def test_an_error_is_the_same_behind_the_wire(kind: type[BsnsError]) -> None:
    error = kind("what to do")
    again = error_from_wire(error.code, error.message, PeerId("x"))
    assert type(again) is kind
    assert (again.message, again.peer) == ("what to do", "x")


def test_a_newer_peers_error_is_still_a_typed_one() -> None:
    error = error_from_wire("Hiccup", "try later")
    assert type(error) is PeerFailed
    assert "Hiccup" in error.message
    assert "try later" in error.message


@pytest.mark.parametrize("code", ["PeerFailed", "\x1b[2JHiccup"])
def test_what_a_peer_says_is_one_readable_line(code: str) -> None:
    error = error_from_wire(code, "first\nsecond \x1b[31mred\x07\u202e" + "x" * 100_000)
    assert "first second [31mred" in error.message
    assert error.message.isprintable()
    assert len(error.message) <= 1000


def test_whoever_is_blamed_first_stays_blamed() -> None:
    error: PeerError = PeerLost("gone")
    assert error.peer is None
    assert error.about(PeerId("a")).about(PeerId("b")).peer == "a"
    assert PeerLost("another").peer is None
