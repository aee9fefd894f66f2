"""`bsns bench serve`: what people who use a swarm get from it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from bsns.bench.machine import cpu_name
from bsns.bench.table2 import bench_table2
from bsns.model.source import resolve

Told = Callable[[str], None]


async def bench_serve(model: str, *, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. Needs an emulated network."""
    started_s, load_before = time.monotonic(), os.getloadavg()[0]
    source = await asyncio.to_thread(resolve, model)
    figures = await bench_table2(model, source, quick=quick, told=told)
    return {
        **figures,
        "model": source.name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "quick": quick,
        "took_s": round(time.monotonic() - started_s),
        "load_before": round(load_before, 2),
    }
