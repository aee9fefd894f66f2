"""What a session opens with, and a node of its route that dies meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from bsns.client.links import Link, Links
from bsns.client.session import Session
from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerLost
from bsns.core.ids import ModelId, PeerId
from bsns.protocol.inference import Close, Open
from bsns.routing.chain import Hop


class Mortal(Link):
    """A link whose node answers Open, and may be dead right after."""

    def __init__(self, peer: PeerId, dies: bool) -> None:
        self.peer = peer
        self.lost = None
        self.dies = dies
        self.opened: list[Open] = []
        self.said: list[Any] = []

    async def open(self, message: Open, deadline_s: float) -> int:
        self.opened.append(message)
        if self.dies:
            self.lost = PeerLost(f"the stream to {self.peer} closed")
        return 1

    def post(self, message: Any, buffers: Sequence[Any] = ()) -> None:
        self.said.append(message)


class Shelf:
    def __init__(self, *links: Mortal) -> None:
        self.links = {link.peer: link for link in links}

    async def to(self, peer: PeerId, addresses: Sequence[str] = ()) -> Mortal:
        return self.links[peer]


async def test_stages_are_told_how_many_of_them_compute_at_once() -> None:
    links = [Mortal(PeerId(name), dies=False) for name in "abc"]
    shared = {"b": b"m", "c": b"m"}
    route = tuple(
        Hop(link.peer, BlockRange(n, n + 1), (), machine=shared.get(link.peer, b"")) for n, link in enumerate(links)
    )
    session = Session(cast("Links", Shelf(*links)), route, model=ModelId("m"), dtype="float32", max_tokens=8)
    await session.open()
    assert [(request.depth, request.at_once) for link in links for request in link.opened] == [(3, 2)] * 3


@pytest.mark.parametrize("dead", [0, 1])
async def test_a_node_that_opens_and_dies_fails_the_opening_and_is_blamed(dead: int) -> None:
    links = [Mortal(PeerId(name), index == dead) for index, name in enumerate("ab")]
    route = tuple(Hop(link.peer, BlockRange(n, n + 1), ()) for n, link in enumerate(links))
    session = Session(cast("Links", Shelf(*links)), route, model=ModelId("m"), dtype="float32", max_tokens=8)
    with pytest.raises(PeerLost) as caught:
        await session.open()
    assert caught.value.peer == "ab"[dead]
    assert links[1 - dead].said == [Close(session.id)]  # the other's cache is given back
