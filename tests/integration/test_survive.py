"""Answers among real processes that fail in every way: the cells of `bsns bench survive`."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import BLOCKS, tiny

from bsns.bench.emulation import NAMESPACES, Network, hindrance
from bsns.bench.faults import CLIENT, CUT, SIGNALS, homes
from bsns.bench.offices import BOOTSTRAP, ORCHESTRATOR, bench_offices
from bsns.bench.survive import DTYPE, PLACES, Bench, ranges_of
from bsns.model.source import resolve
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.worker.faults import VARIABLE

__all__ = ["tiny"]


def silent(_: str) -> None:
    """Tells nobody."""


def survived(figures: dict[str, Any], fault: str) -> None:
    for place in PLACES:
        assert figures["exact"][fault][place], (fault, place)
        assert figures["freed"][fault][place], (fault, place)
        if fault != "slow":
            assert figures["repairs"][fault][place] >= 1, (fault, place)
            assert figures["recomputed"][fault][place] > 0, (fault, place)


async def test_every_fault_in_every_place(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is slow enough in a model this small: there it is only that a node that grows slower changes nothing."""
    monkeypatch.setenv(VARIABLE, "1")
    source = resolve(str(Path(tiny)))
    ranges = ranges_of(BLOCKS)
    async with LocalSwarm(tiny, ranges, dtype=DTYPE) as swarm, Client.on(swarm.peer, source, dtype=DTYPE) as client:
        figures = await Bench(swarm, client).cells(quick=True, told=silent)
    for fault in SIGNALS:
        survived(figures, fault)


@pytest.mark.skipif(hindrance() is not None, reason=hindrance() or "")
async def test_cut_networks(tiny: str) -> None:
    source = resolve(str(Path(tiny)))
    ranges = ranges_of(BLOCKS)
    async with AsyncExitStack() as stack:
        network = stack.enter_context(Network(len(ranges) + 1))
        stack.enter_context(network.entered(CLIENT))
        own_home, places = Home(network.address(CLIENT)), homes(network, len(ranges))
        swarm = LocalSwarm(tiny, ranges, dtype=DTYPE, homes=places, own_home=own_home)
        await stack.enter_async_context(swarm)
        client = await stack.enter_async_context(Client.on(swarm.peer, source, dtype=DTYPE))
        survived(await Bench(swarm, client, network).cells(quick=True, told=silent, faults=(CUT,)), CUT)
    assert not list(NAMESPACES.glob(f"bsns-{os.getpid()}-*"))


async def test_offices_are_not_missed(tiny: str) -> None:
    told: list[str] = []
    figures = await bench_offices(tiny, resolve(str(Path(tiny))), quick=True, dtype=DTYPE, told=told.append)
    for place in (ORCHESTRATOR, BOOTSTRAP):
        assert figures["exact"]["kill"][place], told
        assert figures["freed"]["kill"][place], told
        assert figures["joined"]["kill"][place], told
        assert figures["repairs"]["kill"][place] == figures["recomputed"]["kill"][place] == 0, told
    assert figures["successor_s"]["kill"] is not None, told
