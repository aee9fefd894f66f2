"""Announcing: a node that comes up tries again, and one whose speed has changed says so."""

from __future__ import annotations

import msgspec
import pytest
from memory_swarm import MemorySwarm
from test_moving import BLOCKS, OLD, Idler

from bsns.core.errors import BsnsError, NotAMember, PeerFailed, PeerTimedOut
from bsns.node import server
from bsns.simulator.clock import VirtualLoop, run
from bsns.swarm.identity import Identity
from bsns.swarm.records import check_record

NOW_S = 1_800_000_000.0


async def _attempts(loop: VirtualLoop, errors: list[BsnsError]) -> int:
    attempts = 0

    async def publish() -> None:
        nonlocal attempts
        attempts += 1
        if errors:
            raise errors.pop(0)

    await server.taken(publish, loop)
    return attempts


def test_a_node_that_comes_up_tries_until_its_record_is_taken() -> None:
    errors: list[BsnsError] = [PeerFailed("nobody took it"), PeerTimedOut("nor in time")]
    assert run(lambda loop: _attempts(loop, errors)) == 3


def test_it_gives_up_in_the_end_and_says_why() -> None:
    async def main(loop: VirtualLoop) -> float:
        with pytest.raises(PeerFailed, match="nobody"):
            await _attempts(loop, [PeerFailed("nobody took it")] * 1000)
        return loop.time()

    assert server.TAKEN_S <= run(main) <= server.TAKEN_S + 2 * server.AGAIN_S


def test_a_refusal_is_no_reason_to_try_again() -> None:
    async def main(loop: VirtualLoop) -> float:
        with pytest.raises(NotAMember):
            await _attempts(loop, [NotAMember("no")])
        return loop.time()

    assert run(main) == 0


@pytest.mark.parametrize(
    ("now_s", "said_s", "differs"),
    [(0.01, 0.01, False), (0.012, 0.01, False), (0.013, 0.01, True), (0.0079, 0.01, True), (0.0, 0.0, False)],
)
def test_what_is_told_soon(now_s: float, said_s: float, differs: bool) -> None:
    assert server._differs(now_s, said_s) == differs


async def test_a_node_that_began_by_a_wrong_clock_is_sane_when_it_is_right(swarm: MemorySwarm) -> None:
    """Its record would have begun after its end, and nobody would take it for an hour."""
    node = await swarm.add_node("me", Idler(OLD), block_count=BLOCKS)
    (record,) = swarm.directory.shelf.values()
    peer = Identity((1).to_bytes(32, "big")).peer
    record = msgspec.structs.replace(record, peer=peer, addresses=(), started_s=NOW_S + 3600)
    renewed = server._renewed(record, node.worker, NOW_S)
    check_record(renewed)
    assert renewed.started_s == NOW_S
