"""What a local swarm makes of what its nodes' processes say, and how they end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import CorruptModel, PeerFailed
from bsns.node.local import Home, LocalSwarm, _all, _how, _Node
from bsns.node.processes import Process


async def swarm_of(*scripts: str) -> tuple[LocalSwarm, list[tuple[int, str]]]:
    """A swarm whose nodes are shell scripts."""
    told: list[tuple[int, str]] = []
    ranges = [BlockRange(n, n + 1) for n in range(len(scripts))]
    swarm = LocalSwarm("m", ranges, told=lambda number, what: told.append((number, what)))
    for script in scripts:
        process = await asyncio.create_subprocess_exec("sh", "-c", script, stdout=asyncio.subprocess.PIPE)
        blocks = ranges[len(swarm.processes)]
        swarm._nodes.append(_Node(blocks, (), Home(), process))
    return swarm, told


async def test_progress_is_passed_on_and_noise_is_not() -> None:
    swarm, told = await swarm_of(
        """echo '{"event": "progress", "what": "loading"}'; echo x; echo []; """
        """echo '{"event": "serving", "id": "a", "invite": "b"}';"""
        "exec sleep 9"
    )
    try:
        await swarm._until_serving(0)
        assert told == [(0, "blocks 0:1: loading"), (0, "blocks 0:1: serving")]
        assert (swarm.members(), swarm.invite_of(0)) == ({"a": 0}, "b")
    finally:
        await swarm.close()
    assert swarm.processes[0].returncode is not None


async def test_a_nodes_own_error_is_raised() -> None:
    swarm, _ = await swarm_of("""echo '{"event": "error", "code": "CorruptModel", "message": "it is damaged"}'""")
    with pytest.raises(CorruptModel, match="node 1: it is damaged"):
        await swarm._until_serving(0)
    await swarm.close()


async def test_a_node_that_ends_without_a_word() -> None:
    swarm, _ = await swarm_of("exit 3", "kill -9 $$")
    with pytest.raises(PeerFailed, match="node 1 ended with status 3 before it served"):
        await swarm._until_serving(0)
    with pytest.raises(PeerFailed, match="node 2 was ended by SIGKILL"):
        await swarm._until_serving(1)
    await swarm.close()


async def test_a_lost_node_is_named() -> None:
    swarm, _ = await swarm_of("exec sleep 60", "exit 1")
    try:
        number, error = await swarm.lost()
        assert (number, error.message) == (1, "node 2 ended with status 1; nobody holds blocks 1:2 now")
    finally:
        await swarm.close()


class Again(LocalSwarm):
    """Nodes that are started again run these scripts, the first of them first."""

    def __init__(self, *scripts: str) -> None:
        super().__init__("m", [BlockRange(0, 1)])
        self.scripts = list(scripts)
        self._peer = cast("Any", SimpleNamespace(invite="i", close=AsyncMock()))

    async def _spawn(self, words: Sequence[str], home: Home, invite: str | None) -> Process:
        return await asyncio.create_subprocess_exec("sh", "-c", self.scripts.pop(0), stdout=asyncio.subprocess.PIPE)


SERVING = """echo '{"event": "serving", "id": "a", "invite": "b"}'"""


@pytest.mark.parametrize(
    ("again", "why"),
    [
        (f"{SERVING}; exit 3", "node 1 ended with status 3; nobody holds blocks 0:1 now, soon after it was started"),
        ("exit 4", "node 1 ended with status 4 before it served"),
        ("""echo '{"event": "error", "code": "NotEnoughMemory", "message": "too little"}'""", "node 1: too little"),
    ],
)
async def test_a_lost_node_is_started_again_unless_that_does_not_help(again: str, why: str) -> None:
    swarm = Again("exit 1", again)
    told: list[str] = []
    async with asyncio.timeout(20):
        await swarm._begin(BlockRange(0, 1), (), Home(), None)
        try:
            assert (await swarm.mend(told.append)).message == why
        finally:
            await swarm.close()
    assert told[0] == "node 1 ended with status 1; nobody holds blocks 0:1 now; starting it again"
    assert told[1:] == (["node 1 serves again"] if SERVING in again else [])


async def test_a_node_that_is_lost_now_and_then_is_started_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsns.node.local.AGAIN_S", 0.0)
    swarm = Again("exit 1", f"{SERVING}; exit 1", f"{SERVING}; exec sleep 60")
    told: asyncio.Queue[str] = asyncio.Queue()
    async with asyncio.timeout(20):
        await swarm._begin(BlockRange(0, 1), (), Home(), None)
        mending = asyncio.create_task(swarm.mend(told.put_nowait))
        try:
            assert ["starting it again" in await told.get() for _ in range(4)] == [True, False, True, False]
            assert not mending.done()
            assert swarm.processes[0].returncode is None
        finally:
            mending.cancel()
            await swarm.close()


async def test_a_node_that_is_lost_while_another_is_started_again_is_next() -> None:
    swarm = Again("exit 1", "exit 2", f"{SERVING}; exec sleep 60", f"{SERVING}; exec sleep 60")
    told: asyncio.Queue[str] = asyncio.Queue()
    async with asyncio.timeout(20):
        for number in range(2):
            await swarm._begin(BlockRange(number, number + 1), (), Home(), None)
        mending = asyncio.create_task(swarm.mend(told.put_nowait))
        try:
            said = [await told.get() for _ in range(4)]
            assert sorted(line.partition(" ended")[0] for line in said[::2]) == ["node 1", "node 2"]
            assert sorted(said[1::2]) == ["node 1 serves again", "node 2 serves again"]
            assert [process.returncode for process in swarm.processes] == [None, None]
        finally:
            mending.cancel()
            await swarm.close()


async def test_a_node_deaf_to_signals_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsns.node.local.STOP_DEADLINE_S", 0.1)
    serving = """echo '{"event": "serving", "id": "a", "invite": "b"}'"""
    swarm, _ = await swarm_of(f"trap '' TERM; {serving}; while :; do sleep 0.05; done")
    await swarm._until_serving(0)
    await swarm.close()
    assert swarm.processes[0].returncode == -9


async def test_a_node_that_is_let_go_is_not_lost() -> None:
    swarm, _ = await swarm_of("exec sleep 60", "exec sleep 60")
    try:
        await swarm.let_go(0, signal.SIGKILL)
        assert swarm.processes[0].returncode == -signal.SIGKILL
        swarm.processes[1].kill()
        assert "node 2 was ended" in (await swarm.lost())[1].message
    finally:
        await swarm.close()


async def test_the_first_error_cancels_the_rest() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise PeerFailed("first")

    async def go_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    with pytest.raises(PeerFailed, match="first"):
        await _all([go_on(), fail(), go_on()])
    assert ended == ["ended", "ended"]


def test_how_a_process_ended() -> None:
    assert _how(0) == "ended with status 0"
    assert _how(-15) == "was ended by SIGTERM"
    assert _how(-9999) == "ended with status -9999"
