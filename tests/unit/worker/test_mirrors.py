"""Mirrors: what a spare is sent, and what nobody can do with them."""

from __future__ import annotations

import numpy as np
import pytest
from memory_swarm import Node, until
from test_service import Bench, Caller, bench, hidden, opening

from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Close, Mirror, Mirrored, Opened, Reroute, Rerouted

__all__ = ["bench"]

SESSION = SessionId(1)
SPARE = PeerId("spare")


class Line:
    """A first stage, its second, and a spare for that, each with the client's stream to it."""

    def __init__(self, bench: Bench, nodes: dict[str, Node], callers: dict[str, Caller]) -> None:
        self.bench, self.nodes, self.callers = bench, nodes, callers

    async def mirror(self, peer: PeerId | None = SPARE, position: int = 0) -> Mirrored:
        addresses = self.nodes["spare"].transport.addresses if peer is not None else ()
        answered = await self.callers["first"].ask(Mirror(SESSION, peer, addresses, position))
        assert isinstance(answered, Mirrored)
        return answered

    async def computed(self, rows: int) -> None:
        """Until the spare has computed so many rows in all."""
        await until(lambda: self.nodes["spare"].worker.rows == rows)


@pytest.fixture
async def line(bench: Bench) -> Line:
    nodes = {name: await bench.node(name) for name in ("first", "second", "spare")}
    callers = {name: await bench.call(node) for name, node in nodes.items()}
    onward = {"next_peer": PeerId("second"), "next_addresses": nodes["second"].transport.addresses}
    after = {"previous_peer": PeerId("first")}
    assert isinstance(await callers["second"].ask(opening(nodes["second"], depth=2, **after)), Opened)
    assert isinstance(await callers["first"].ask(opening(nodes["first"], depth=2, **onward)), Opened)
    asleep = opening(nodes["spare"], depth=2, passes_from=32, **after)
    assert isinstance(await callers["spare"].ask(asleep), Opened)
    return Line(bench, nodes, callers)


async def test_a_spare_gets_what_the_next_stage_has_got_and_gets(line: Line) -> None:
    await line.callers["first"].step(0, 3)
    await line.callers["second"].result()
    assert await line.mirror() == Mirrored(SESSION, SPARE)
    await line.computed(3)
    await line.callers["first"].step(3, 1, wanted=1)
    await line.callers["second"].result()
    await line.computed(4)
    await line.callers["first"].step(2, 1, wanted=1)  # what is computed anew is mirrored anew
    await line.callers["second"].result()
    await line.computed(5)
    assert await line.callers["spare"].far(SESSION) == (3, 3)
    assert await line.mirror(None) == Mirrored(SESSION, None)
    await line.callers["first"].step(3, 1, wanted=1)
    await line.callers["second"].result()
    assert await line.callers["spare"].far(SESSION) == (3, 3)
    assert not line.nodes["first"].worker._replays


async def test_a_spare_takes_the_place_with_its_newest_row_alone(line: Line) -> None:
    await line.callers["first"].step(0, 4, wanted=1)
    assert not (await line.mirror()).code
    await line.computed(4)
    line.bench.swarm.network.kill(PeerId("second"))
    assert (await line.callers["first"].failure()).about == "second"
    turned = Reroute(SESSION, PeerId("first"), None, passes_from=3)
    assert await line.callers["spare"].ask(turned) == Rerouted(SESSION)
    around = Reroute(SESSION, None, SPARE, line.nodes["spare"].transport.addresses, again=True, position=3)
    assert await line.callers["first"].ask(around) == Rerouted(SESSION)
    result, rows = await line.callers["spare"].result()
    assert [(part.position, part.rows, part.wanted) for part in result.parts] == [(3, 1, 1)]
    assert np.array_equal(rows, hidden(3, 1) + 2)
    assert line.nodes["spare"].worker.rows == 5
    await until(lambda: not line.nodes["first"].worker._replays)


async def test_a_next_stage_that_was_no_mirror_is_sent_everything(line: Line) -> None:
    """Whatever position it is said to have."""
    await line.callers["first"].step(0, 4, wanted=1)
    await line.callers["spare"].ask(Reroute(SESSION, PeerId("first"), None, passes_from=3))
    around = Reroute(SESSION, None, SPARE, line.nodes["spare"].transport.addresses, again=True, position=3)
    assert await line.callers["first"].ask(around) == Rerouted(SESSION)
    await line.callers["spare"].result()
    assert line.nodes["spare"].worker.rows == 4


async def test_a_mirror_that_is_gone_is_told_of(line: Line) -> None:
    assert not (await line.mirror()).code
    line.bench.swarm.network.kill(SPARE)
    failure = await line.callers["first"].failure()
    assert (failure.code, failure.about) == ("PeerLost", SPARE)
    assert not line.nodes["first"].worker._replays


async def test_a_mirror_without_the_session_is_told_of(line: Line) -> None:
    assert not (await line.mirror()).code
    await line.callers["spare"].ask(Close(SESSION))
    await line.callers["first"].step(0, 1, wanted=1)
    failure = await line.callers["first"].failure()
    assert (failure.code, failure.about) == ("UnknownSession", SPARE)
    assert not line.nodes["first"].worker._replays


async def test_a_mirror_ends_with_its_session(line: Line) -> None:
    assert not (await line.mirror()).code
    await line.callers["first"].ask(Close(SESSION))
    assert not line.nodes["first"].worker._replays


async def test_what_nobody_may_do_with_a_mirror(line: Line) -> None:
    stranger = await line.bench.call(line.nodes["first"], "stranger")
    answered = await stranger.ask(Mirror(SESSION, SPARE))
    assert isinstance(answered, Mirrored)
    assert answered.code == "UnknownSession"
    last = await line.callers["second"].ask(Mirror(SESSION, SPARE))
    assert isinstance(last, Mirrored)
    assert last.code == "BadFrame"
    for peer, addresses, position, code in (
        (PeerId("first"), (), 0, "PeerUnreachable"),  # itself
        (PeerId("second"), (), 0, "BadFrame"),  # who gets it anyway
        (PeerId("nowhere"), (), 0, "PeerUnreachable"),
        (PeerId("x" * 300), (), 0, "BadFrame"),
        (SPARE, ("/a",) * 17, 0, "BadFrame"),
        (SPARE, ("a" * 300,), 0, "BadFrame"),
        (SPARE, (), -1, "BadFrame"),
        (SPARE, (), 33, "BadFrame"),
    ):
        answered = await line.callers["first"].ask(Mirror(SESSION, peer, addresses, position))
        assert isinstance(answered, Mirrored)
        assert answered.code == code, (peer, addresses, position)
    back = await line.callers["first"].ask(Reroute(SESSION, PeerId("before"), PeerId("second")))
    assert back == Rerouted(SESSION)
    answered = await line.callers["first"].ask(Mirror(SESSION, PeerId("before")))
    assert isinstance(answered, Mirrored)
    assert answered.code == "BadFrame"
    assert not line.nodes["first"].worker._replays


@pytest.mark.parametrize("bad", [{"position": 33, "again": True}, {"position": -1, "again": True}, {"passes_from": 33}])
async def test_positions_beyond_what_is_reserved(line: Line, bad: dict[str, int]) -> None:
    answered = await line.callers["first"].ask(Reroute(SESSION, None, PeerId("second"), **bad))  # type: ignore[arg-type]
    assert isinstance(answered, Rerouted)
    assert answered.code == "BadFrame"
