"""A stop string ends the text at the same place however the text was split."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.client.detokenize import StopMatcher

texts = st.text("abc", max_size=30)
stops_of = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character."""
    for end in range(1, len(text) + 1):
        met = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(met)], True
    return text, False


@settings(max_examples=400)
@given(text=texts, stops=stops_of, cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_split(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    emitted, stopped = "", False
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        piece, stopped = matcher.push(text[start:end])
        emitted += piece
        expected, _ = reference(text, stops)
        assert expected.startswith(emitted)
        held = text[len(emitted) : end]
        if not stopped:
            # Nothing is held back without need.
            assert held == "" or any(stop.startswith(held) for stop in stops)
    emitted += matcher.flush()
    assert (emitted, stopped) == reference(text, stops)
