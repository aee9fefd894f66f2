"""What the emulated swarms' report makes of measured speeds; nothing is emulated here."""

from __future__ import annotations

import dataclasses

import pytest

from bsns.bench.layouts import Layout, as_plan, compared_speeds, summary
from bsns.core.ids import ModelId, PeerId
from bsns.core.snapshot import Link, ModelShape, NodeView, Snapshot, pair
from bsns.node.client import Client
from bsns.planning.network import chain_problem
from bsns.planning.problem import Chain, Stage

PEERS = [PeerId(name) for name in ("a", "b", "c")]
SHAPE = ModelShape(ModelId("m"), "m", (100,) * 6, 1, 1000)
SNAPSHOT = Snapshot(
    0.0,
    tuple(NodeView(peer, time_s, 1000) for peer, time_s in zip(PEERS, (0.01, 0.02, 0.05), strict=True)),
    {pair(one, other): Link(0.02, 1e6) for one, other in (("a", "b"), ("b", "c"), ("a", "c"))},
    {peer: Link(0.004) for peer in PEERS},
)
PROBLEM = chain_problem(SNAPSHOT, SHAPE, client_s=0.003)
EQUAL: Chain = (Stage(0, 0, 2), Stage(1, 2, 4), Stage(2, 4, 6))
PLANNED: Chain = (Stage(0, 0, 4), Stage(1, 4, 6))


def layout(chain: Chain, *speeds: float) -> Layout:
    made = Layout(chain, Client("bsns1-"), as_plan(SHAPE, PROBLEM, chain))
    made.measured[1] = list(speeds)
    return made


def test_a_chain_as_a_plan_keeps_every_cost() -> None:
    plan = as_plan(SHAPE, PROBLEM, EQUAL)
    assert [stage.peer for stage in plan.stages] == PEERS
    assert [stage.compute_s for stage in plan.stages] == pytest.approx([0.02, 0.04, 0.10])
    assert [stage.transfer_s for stage in plan.stages] == pytest.approx([0.002, 0.011, 0.011])
    assert plan.latency_s == pytest.approx(0.16 + 0.024 + 0.002 + 0.003)


def test_a_row_compares_predicted_and_measured() -> None:
    row = compared_speeds(layout(EQUAL, 5.0, 4.0, 9.0), layout(PLANNED, 10.0), 1)
    assert row["equal"]["measured"] == 5.0
    assert row["equal"]["spread"] == [4.0, 9.0]
    assert row["equal"]["error"] == pytest.approx(1 / 0.189 / 5 - 1, abs=1e-3)
    assert row["planned"]["layout"] == "0:4@0 4:6@1"
    assert row["measured_gain"] == 1.0
    assert row["predicted_gain"] == pytest.approx(0.189 / 0.098 - 1, abs=2e-3)


def test_the_summary_counts_promises_kept() -> None:
    rows = []
    for measured in ((5.0, 10.0), (5.0, 4.0), (5.0, 9.0)):
        row = compared_speeds(layout(EQUAL, measured[0]), layout(PLANNED, measured[1]), 1)
        rows.append({"latency": row, "throughput": row | {"predicted_gain": 0.05}})
    totals = summary(rows)
    assert (totals["latency"]["promising"], totals["latency"]["kept"]) == (3, 2)
    assert (totals["throughput"]["promising"], totals["throughput"]["kept"]) == (0, 0)
    assert totals["latency"]["median_measured_gain"] == 0.8


def test_a_layout_is_one_whatever_it_is_compared_with() -> None:
    one = layout(EQUAL, 1.0)
    assert one != dataclasses.replace(one)
    assert len(dict.fromkeys((one, one))) == 1
