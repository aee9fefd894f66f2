"""`bsns bench plan`: how near our plans come to the best possible, how fast, and whether a network's shape helps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bsns.bench.ablation import run_ablation
from bsns.bench.chain_suite import run_chain_suite
from bsns.bench.graph_suite import run_graph_suite

Told = Callable[[str], None]

PARTS: dict[str, Callable[[bool, Told], dict[str, Any]]] = {
    "chain": run_chain_suite,
    "dag": run_graph_suite,
    "ablation": run_ablation,
}


def bench_plan(parts: list[str], *, quick: bool, told: Told) -> dict[str, Any]:
    """Run the suites and merge their figures; keys as in docs/benchmarks.md."""
    figures: dict[str, Any] = {}
    load_before = os.getloadavg()[0]
    for part in parts:
        figures = _merged(figures, PARTS[part](quick, told))
    return figures | {"quick": quick, "load_before": round(load_before, 2)}


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, key by key; where both have a table, the tables merged."""
    merged = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
