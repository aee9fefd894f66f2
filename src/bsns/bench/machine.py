"""The machine that is measured: its name."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} × {os.cpu_count()}"
    return f"{os.cpu_count()} cores"
