"""Answers among real processes that fail in every way: the cells of `bsns bench survive`."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import BLOCKS, tiny
from running_time import running_s

from bsns.bench.emulation import NAMESPACES, Network, hindrance
from bsns.bench.faults import CLIENT, CUT, SIGNALS, homes
from bsns.bench.offices import BOOTSTRAP, ORCHESTRATOR, bench_offices
from bsns.bench.survive import DTYPE, PLACES, Bench, ranges_of
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.model.source import resolve
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.planning.joining import equal_split
from bsns.worker.faults import VARIABLE

__all__ = ["tiny"]

PLAIN: dict[str, Any] = {"speculate": False, "keep_sessions": 0}
"""What a replay costs is counted in rows: none are guessed, and none are there already."""
LEAVE = "leave"
LONG = SamplingOptions(max_tokens=600)
"""An answer that lasts until those who are asked to leave have heard of it: they serve it to its end otherwise."""


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
    async with (
        LocalSwarm(tiny, ranges, dtype=DTYPE) as swarm,
        Client.on(swarm.peer, source, dtype=DTYPE, **PLAIN) as client,
    ):
        bench = Bench(swarm, client)
        figures = await bench.cells(quick=True, told=silent, faults=[fault for fault in SIGNALS if fault != LEAVE])
        leaving = await bench.cells(quick=True, told=silent, faults=[LEAVE], sampling=[LONG])
    for fault in SIGNALS:
        survived(leaving if fault == LEAVE else figures, fault)


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
        client = await stack.enter_async_context(Client.on(swarm.peer, source, dtype=DTYPE, **PLAIN))
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


async def test_a_killed_stage_with_a_warm_spare(tiny: str) -> None:
    """Two stages and a spare for each: the answer goes on at once, and nobody has computed anything again."""
    source, place = resolve(str(Path(tiny))), 1
    ranges = [*equal_split(BLOCKS, 2), *equal_split(BLOCKS, 2)]
    async with (
        LocalSwarm(tiny, ranges, dtype=DTYPE) as swarm,
        Client.on(swarm.peer, source, dtype=DTYPE, warm_spares=True) as client,
    ):
        generator, prompt = client.generator, [token % 50 + 3 for token in range(240)]
        options = SamplingOptions(max_tokens=2000)  # not done before the spares are ready
        undisturbed = [piece.token async for piece in generator.stream(prompt, options)]
        stats, tokens, gap_s = Stats(), [], 0.0
        stream = generator.stream(prompt, options, stats)
        tokens.extend([(await anext(stream)).token for _ in range(16)])
        (reader,) = generator._readers.values()

        async def ready() -> bool:
            spares = list(generator._spares._held[reader.session.id].spares.values())
            if len(spares) < 2 or any(spare.link is None for spare in spares):
                return False
            at = [await spare.link.where(reader.session.id, 2.0) for spare in spares if spare.link is not None]
            return all(there.done >= reader.through for there in at)

        async with asyncio.timeout(10):
            while not await ready():  # noqa: ASYNC110  other processes tell nobody
                await asyncio.sleep(0.01)
        swarm.processes[swarm.members()[stats.route[place].peer]].send_signal(signal.SIGKILL)
        before_s = running_s()
        async for piece in stream:
            tokens.append(piece.token)
            gap_s, before_s = max(gap_s, running_s() - before_s), running_s()
        assert tokens == undisturbed
        assert (generator.repairs, generator.warm_repairs) == (1, 1)
        print(f"gap {gap_s:.3f} s")
        assert gap_s < 1.0, "0.3 s where nothing else runs"
        assert await _is_freed(client)


async def _is_freed(client: Client) -> bool:
    """Whether no node holds a session, 2 s after an answer at the latest."""
    give_up_s = running_s() + 2.0
    while running_s() < give_up_s:
        nodes = [node.now for node in await client.status() if node.now is not None]
        if not any(node.sessions for node in nodes):
            return True
    return False
