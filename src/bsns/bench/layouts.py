"""Layouts under measurement: a chain of nodes that serve, what is predicted of it, and what it did."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, PeerError, PeerFailed
from bsns.core.plan import Objective, Plan, PlannedStage
from bsns.core.snapshot import ModelShape
from bsns.node.client import Client
from bsns.planning.problem import Chain, ChainProblem

TOKENS = 12
PROMPT = "Once upon a time"
ANSWERING_S = 20.0
WORTH = 0.10
"""Where a plan promises less than this over the equal split, which of them is faster is left to chance."""


@dataclass(eq=False, slots=True)
class Layout:
    """A chain of nodes that serve, what is predicted of it, and what was measured: tokens/s by streams."""

    chain: Chain
    client: Client
    plan: Plan
    measured: dict[int, list[float]] = field(default_factory=dict)

    async def run(self, streams: int) -> None:
        """Decode so many answers at once, and note their speed while all of them decode. Raises PeerFailed."""
        answers = await asyncio.gather(*(_answer(self.client) for _ in range(streams)))
        for _, stats in answers:
            route = tuple((hop.blocks.start, hop.blocks.end) for hop in stats.route)
            if route != tuple((stage.start, stage.end) for stage in self.chain):  # each range is held by one node
                raise PeerFailed(f"the route {route} is not the layout's")
        begin_s = max(times_s[0] for times_s, _ in answers)
        end_s = min(times_s[-1] for times_s, _ in answers)
        inside = sum(begin_s < at_s <= end_s for times_s, _ in answers for at_s in times_s)
        if not inside:
            raise PeerFailed("the answers did not run at the same time")
        self.measured.setdefault(streams, []).append(inside / (end_s - begin_s))


async def until_answering(client: Client) -> None:
    """Have all streams of a route opened. A node whose first dial failed does not try again for 5 s (libp2p's backoff),
    and there is no other route: so this tries again. Raises what it has met in the end."""
    give_up_s = time.monotonic() + ANSWERING_S
    while True:
        try:
            await _answer(client, 2)
        except PeerError:
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(2.0)
        else:
            return


async def _answer(client: Client, tokens: int = TOKENS) -> tuple[list[float], Stats]:
    """The seconds at which an answer's tokens came, and what it cost."""
    stats, options = Stats(), SamplingOptions(max_tokens=tokens)
    times_s = [time.perf_counter() async for _ in client.stream(PROMPT, options, raw=True, stats=stats)]
    if len(times_s) != tokens:
        raise BadOption(f"the model ended its answer after {len(times_s)} tokens; this benchmark needs {tokens}")
    return times_s, stats


async def measure_client_s(client: Client) -> float:
    """The client's own share of a token: head, sampling, embedding, everything between a result and the next step."""
    times_s, stats = await _answer(client)
    gaps_ms = [(after_s - before_s) * 1e3 for before_s, after_s in pairwise(times_s)]
    return statistics.median(gap - turn for gap, (turn, _) in zip(gaps_ms, stats.turns_ms[1:], strict=True)) / 1e3


def as_plan(shape: ModelShape, problem: ChainProblem, chain: Chain) -> Plan:
    """A chain as a plan, which can say how fast it is."""
    bottleneck_s, latency_s = problem.cost(chain)
    stages = []
    for stage, stage_s in zip(chain, problem.stage_s(chain), strict=True):
        compute_s = float(problem.work_L[stage.start : stage.end].sum() * problem.time_N[stage.node])
        blocks = BlockRange(stage.start, stage.end)
        stages.append(PlannedStage(blocks, problem.peers[stage.node], compute_s, stage_s - compute_s))
    return Plan(
        model=shape.model,
        model_name=shape.name,
        block_count=shape.block_count,
        objective=Objective(),
        stages=tuple(stages),
        left_out=(),
        bottleneck_s=bottleneck_s,
        latency_s=latency_s,
        lower_bound_s=0.0,
        gap=math.inf,
        method="given",
    )


def compared_speeds(equal: Layout, planned: Layout, streams: int) -> dict[str, Any]:
    """Both layouts' speeds with so many streams, predicted and measured."""
    row: dict[str, Any] = {}
    for name, layout in (("equal", equal), ("planned", planned)):
        predicted, speeds = layout.plan.tokens_per_s(streams), layout.measured[streams]
        measured = statistics.median(speeds)
        row[name] = {
            "layout": " ".join(f"{stage.start}:{stage.end}@{stage.node}" for stage in layout.chain),
            "predicted": round(predicted, 2),
            "measured": round(measured, 2),
            "spread": [round(min(speeds), 2), round(max(speeds), 2)],
            "error": round(predicted / measured - 1, 3),
        }
    gains = {figure: row["planned"][figure] / row["equal"][figure] - 1 for figure in ("predicted", "measured")}
    return row | {f"{figure}_gain": round(gain, 3) for figure, gain in gains.items()}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for objective in ("latency", "throughput"):
        compared = [row[objective] for row in rows]
        errors = [abs(row[name]["error"]) for row in compared for name in ("equal", "planned")]
        worth = [row for row in compared if row["predicted_gain"] >= WORTH]
        totals[objective] = {
            "median_error": round(statistics.median(errors), 3),
            "worst_error": round(max(errors), 3),
            "promising": len(worth),
            "kept": sum(row["measured_gain"] > 0 for row in worth),
            "median_predicted_gain": round(statistics.median(row["predicted_gain"] for row in compared), 3),
            "median_measured_gain": round(statistics.median(row["measured_gain"] for row in compared), 3),
        }
    return totals
