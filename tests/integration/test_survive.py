"""Answers among real processes that are killed, stopped, slowed and made to lie: the cells of `bsns bench survive`."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import BLOCKS, tiny

from bsns.bench.survive import DTYPE, PLACES, SIGNALS, Bench
from bsns.model.source import resolve
from bsns.node.client import Client
from bsns.node.local import LocalSwarm
from bsns.planning.joining import equal_split
from bsns.worker.faults import VARIABLE

__all__ = ["tiny"]


async def test_every_fault_in_every_place(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is slow enough in a model this small: there it is only that a node that grows slower changes nothing."""
    monkeypatch.setenv(VARIABLE, "1")
    source = resolve(str(Path(tiny)))
    ranges = [*equal_split(BLOCKS, 4), *equal_split(BLOCKS, 2)]
    async with LocalSwarm(tiny, ranges, dtype=DTYPE) as swarm, Client.on(swarm.peer, source, dtype=DTYPE) as client:
        figures = await Bench(swarm, client, ranges).cells(quick=True, told=lambda _: None)
    for fault in SIGNALS:
        for place in PLACES:
            assert figures["exact"][fault][place], (fault, place)
            assert figures["freed"][fault][place], (fault, place)
            assert fault == "slow" or figures["repairs"][fault][place] >= 1, (fault, place)
