"""Figures as people read them, the same in every message and table."""

from __future__ import annotations


def several(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(size_bytes: float) -> str:
    """Bytes as three digits and a binary unit: `90 B`, `1.5 GiB`, `11.9 TiB`."""
    value, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    # 999.5 of a unit would round to four digits
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}" if abs(value) < 999.5 else f"{value:.0f} {units[0]}"
