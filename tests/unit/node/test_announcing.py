"""Announcing: a node that comes up tries again, and one whose speed has changed says so."""

from __future__ import annotations

import pytest

from bsns.core.errors import BsnsError, NotAMember, PeerFailed, PeerTimedOut
from bsns.node import server
from bsns.simulator.clock import VirtualLoop, run


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
