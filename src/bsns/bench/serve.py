"""`bsns bench serve`: what people who use a swarm get from it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Callable, Collection
from typing import Any

from bsns.bench.emulation import hindrance
from bsns.bench.load import bench_load
from bsns.bench.machine import cpu_name
from bsns.bench.rivals import MODEL, bench_rivals
from bsns.bench.table2 import bench_table2
from bsns.model.source import SMOLLM2, resolve

Told = Callable[[str], None]


PARTS = ("table2", "load", "rivals")


async def bench_serve(
    model: str | None = None, *, parts: Collection[str] = PARTS, quick: bool, told: Told
) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. Each part has a model of its own, unless one is named."""
    started_s, load_before = time.monotonic(), os.getloadavg()[0]
    figures: dict[str, Any] = {"left_out": {}}
    for part, problem, bench in (
        ("table2", hindrance(), bench_table2),
        ("load", _missing("openai", "fastapi", "llguidance", "prometheus_client", "sse_starlette"), bench_load),
    ):
        if part in parts and problem is not None:
            told(f"{part} is left out: {problem}")
            figures["left_out"][part] = problem
        elif part in parts:
            source = await asyncio.to_thread(resolve, model or SMOLLM2)
            figures |= await bench(model or SMOLLM2, source, quick=quick, told=told) | {"model": source.name}
    if "rivals" in parts:
        figures |= await bench_rivals(model or MODEL, quick=quick, told=told)
    return {
        **figures,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "quick": quick,
        "took_s": round(time.monotonic() - started_s),
        "load_before": round(load_before, 2),
    }


def _missing(*packages: str) -> str | None:
    """What is not installed, in words; None if nothing is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None
