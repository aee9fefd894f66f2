"""Trials: what a few tokens say of a swarm, and of one node that held everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from bsns.client.pieces import Piece, Stats
from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId
from bsns.node.client import Client
from bsns.node.trial import Trial, try_out
from bsns.protocol.inference import Passed
from bsns.routing.chain import Hop, Route


def route(stages: int) -> Route:
    return tuple(Hop(PeerId(f"n{stage}"), BlockRange(stage, stage + 1), ()) for stage in range(stages))


def trial(stages: int) -> Trial:
    return Trial(9.0, 0.010, route(stages), turn_s=0.030 + 0.001 * (stages + 1), computing_s=0.030)


def test_one_node_alone_saves_the_ways_between_nodes() -> None:
    assert 1 / trial(3).alone_tokens_per_s() == pytest.approx(0.042)


def test_one_node_is_as_fast_as_itself() -> None:
    alone = trial(1)
    assert alone.alone_tokens_per_s() == pytest.approx(1 / (alone.client_s + alone.turn_s))


class Said:
    """A client whose answer has so many tokens of 12 ms: 8 in turns, of those 6 computing, and 4 at the client."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    async def stream(self, *_: Any, stats: Stats, **__: Any) -> AsyncIterator[Piece]:
        stats.route, stats.tokens, stats.ttft_ms = route(2), self.tokens, 50.0
        stats.decode_s = 0.012 * (self.tokens - 1)
        hop = Passed(3.5, 3.0, 1)
        stats.turns_ms = [(50.0, (hop, hop)), *[(8.0, (hop, hop))] * (self.tokens - 1)]
        yield Piece("", None)


async def test_what_a_token_takes_and_where() -> None:
    tried = await try_out(cast("Client", Said(8)))
    assert (tried.client_s, tried.turn_s, tried.computing_s) == pytest.approx((0.004, 0.008, 0.006))
    assert tried.tokens_per_s == pytest.approx(1 / 0.012)


async def test_of_an_answer_that_ends_at_once_only_its_first_token_is_known() -> None:
    tried = await try_out(cast("Client", Said(1)))
    assert 1 / (tried.client_s + tried.turn_s) == pytest.approx(1 / 0.050)
    assert tried.alone_tokens_per_s() == pytest.approx(1 / 0.050)
