"""The real directory of a peer whose clock was wrong, or that nobody answered: it is there again when that is over."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage
from test_records import NOW_S, record_of

from bsns.core.errors import PeerFailed
from bsns.protocol.records import NodeRecord
from bsns.swarm import hivemind_directory
from bsns.swarm.hivemind_directory import ASKED_AGAIN, MAX_KNOWN, HivemindDirectory
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder
from bsns.swarm.membership import Membership

HOUR_S = 3600.0
LIFE_S = 75.0


class LoneNode:
    """What the directory needs of a DHT node that stores at itself only; `met` is its routing table."""

    def __init__(self) -> None:
        self.storage = DHTLocalStorage()
        self.met: dict[str, int] = {}
        self.pinged: list[str] = []
        self.bans_cleared = 0
        self.protocol = SimpleNamespace(
            storage=self.storage, routing_table=SimpleNamespace(peer_id_to_uid=self.met), call_ping=self._ping
        )
        self.blacklist = SimpleNamespace(clear=self._clear)

    def _clear(self) -> None:
        self.bans_cleared += 1

    async def _ping(self, peer: str) -> None:
        self.pinged.append(peer)

    async def store(self, key: str, value: bytes, expires_s: float, subkey: str, exclude_self: bool) -> bool:
        return bool(self.storage.store(DHTID.generate(source=key), value, expires_s, subkey=subkey))

    async def get(self, key: str, latest: bool) -> Any:
        return self.storage.get(DHTID.generate(source=key))


class Scene:
    """A directory on a clock of the test's own."""

    def __init__(self) -> None:
        founder = Founder.found()
        self.now_s = NOW_S
        self.member = Membership.of_founder(founder, Identity.draw(), NOW_S)
        self.node = LoneNode()
        self.directory = HivemindDirectory(cast(DHTNode, self.node), self.member, False, lambda: self.now_s)

    @property
    def record(self) -> NodeRecord:
        return record_of(self.member.peer, started_s=NOW_S - 9999, expires_s=self.now_s + LIFE_S)


async def test_what_a_clock_far_ahead_announced_does_not_stand_in_the_way() -> None:
    scene = Scene()
    await scene.directory.publish(scene.record)
    scene.now_s = NOW_S + HOUR_S
    await scene.directory.publish(scene.record)
    scene.now_s = NOW_S + 30.0
    await scene.directory.publish(scene.record)
    (seen,) = await scene.directory.records()
    assert seen.expires_s == pytest.approx(scene.now_s + LIFE_S)


async def test_a_clock_that_was_behind_leaves_nothing_either() -> None:
    scene = Scene()
    scene.now_s = NOW_S + HOUR_S
    await scene.directory.publish(scene.record)
    scene.now_s = NOW_S
    await scene.directory.publish(scene.record)
    scene.now_s = NOW_S + HOUR_S + 30.0
    await scene.directory.publish(scene.record)
    (seen,) = await scene.directory.records()
    assert seen.expires_s == pytest.approx(scene.now_s + LIFE_S)


async def test_a_goodbye_is_believed_after_a_clock_was_far_ahead() -> None:
    scene = Scene()
    scene.now_s = NOW_S + HOUR_S
    await scene.directory.publish(scene.record)
    scene.now_s = NOW_S
    await scene.directory.publish(scene.record)
    await scene.directory.withdraw(scene.record)
    assert list(await scene.directory.records()) == []
    (stored,) = (item.expiration_time for _, item in scene.node.storage.get(_only_key(scene)).value.items())
    assert NOW_S + LIFE_S < stored < NOW_S + LIFE_S + 2


async def test_what_replaces_something_expires_later_still() -> None:
    scene = Scene()
    long = msgspec.structs.replace(scene.record, expires_s=NOW_S + 600)
    for record in (long, scene.record, scene.record):
        await scene.directory.publish(record)
    scene.directory._last_expiry_s[scene.directory._nodes] = 0.0
    with pytest.raises(PeerFailed):
        await scene.directory.publish(scene.record)


async def test_who_has_lost_sight_of_all_greets_those_it_knew() -> None:
    scene, peers = Scene(), [f"peer-{n}" for n in range(20)]
    scene.node.met.update(dict.fromkeys(peers, 1))
    await scene.directory.records()
    del scene.node.met["peer-3"]  # it did not answer
    await scene.directory.records()
    assert scene.node.pinged == []
    scene.node.met.clear()
    await scene.directory.records()
    assert set(scene.node.pinged) == set(peers[-ASKED_AGAIN:])
    assert scene.node.bans_cleared == 1
    await scene.directory.publish(scene.record)
    assert len(scene.node.pinged) == 2 * ASKED_AGAIN
    scene.node.met.update(dict.fromkeys((f"other-{n}" for n in range(100)), 1))
    await scene.directory.records()
    assert len(scene.directory._known) == MAX_KNOWN


async def test_nobody_waits_long_for_those_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.node.met["peer"] = 1
    await scene.directory.records()
    scene.node.met.clear()
    answers = asyncio.Event()

    async def ping(peer: str) -> None:
        scene.node.pinged.append(peer)
        await answers.wait()

    scene.node.protocol.call_ping = ping
    monkeypatch.setattr(hivemind_directory, "GREETING_S", 0.01)
    for _ in range(3):
        await scene.directory.records()
    assert scene.node.pinged == ["peer"], "it is asked once more before it has answered"
    answers.set()
    for _ in range(2):
        await scene.directory.records()
    assert scene.node.pinged == ["peer", "peer"]


def _only_key(scene: Scene) -> DHTID:
    return DHTID.from_bytes(scene.directory._nodes.id_bytes)
