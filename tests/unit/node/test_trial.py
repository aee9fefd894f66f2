"""What a trial says of one node that held everything."""

from __future__ import annotations

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId
from bsns.node.trial import Trial
from bsns.routing.chain import Hop


def trial(stages: int) -> Trial:
    route = tuple(Hop(PeerId(f"n{stage}"), BlockRange(stage, stage + 1), ()) for stage in range(stages))
    return Trial(tokens_per_s=9.0, client_s=0.010, route=route, turn_s=0.030 + 0.001 * (stages + 1), computing_s=0.030)


def test_one_node_alone_saves_the_ways_between_nodes() -> None:
    assert 1 / trial(3).alone_tokens_per_s() == pytest.approx(0.042)


def test_one_node_is_as_fast_as_itself() -> None:
    alone = trial(1)
    assert alone.alone_tokens_per_s() == pytest.approx(1 / (alone.client_s + alone.turn_s))
