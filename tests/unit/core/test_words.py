"""Figures in words: right plurals, and sizes without exponents."""

from __future__ import annotations

import pytest

from bsns.core.words import several, size


def test_plurals() -> None:
    assert [several(count, "block") for count in (0, 1, 2, 1200)] == ["0 blocks", "1 block", "2 blocks", "1,200 blocks"]


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"),
        (90, "90 B"),
        (999.4, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (500_000_000, "477 MiB"),
        (1000 * 2**20, "0.977 GiB"),
        (13.1e12, "11.9 TiB"),
        (2.0**90, "1073741824 EiB"),
    ],
)
def test_sizes(size_bytes: float, words: str) -> None:
    assert size(size_bytes) == words
