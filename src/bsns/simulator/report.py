"""Reports: a simulation in figures, for programs, and as a picture."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.figure import Figure

from bsns.simulator.world import Outcome

PERCENTILES = (50, 95, 99)
BUCKETS = 120
"""Points of the curve over time."""
COLOURS = {"tokens": "#4477aa", "fault": "#ee6677", "gap": "#228833", "best": "#bbbbbb"}


def report(outcome: Outcome) -> dict[str, Any]:
    """Every figure. Times in milliseconds, except where the name says seconds."""
    answers = outcome.answers
    between = [after - before for a in answers for before, after in pairwise(a.times_s)]
    tokens = sum(len(a.tokens) for a in answers)
    first_s = min((a.asked_s for a in answers), default=0.0)
    span_s = max((a.ended_s for a in answers), default=0.0) - first_s
    injected = Counter(struck.fault.kind for struck in outcome.struck if struck.happened)
    hit = Counter(struck.fault.kind for struck in outcome.struck if struck.sessions)
    figures: dict[str, Any] = {
        "name": outcome.scenario.name,
        "seed": outcome.scenario.seed,
        "nodes": outcome.scenario.node_count,
        "simulated_s": round(outcome.simulated_s, 3),
        "answers": len(answers),
        "whole": sum(a.error is None for a in answers),
        "compared": sum(a.right is not None for a in answers),
        "errors": dict(sorted(outcome.errors.items())),
        "tokens": tokens,
        "tokens_per_s": round(tokens / span_s, 3) if span_s else 0.0,
        "ttft_ms": _percentiles([a.times_s[0] - a.asked_s for a in answers if a.times_s]),
        "between_ms": _percentiles(between),
        "gap_ms": _percentiles([a.gap_s for a in answers]),
        "repairs": outcome.repairs,
        "plans": outcome.plans,
        "moves": outcome.moves,
        "joined": outcome.joined,
        "left": outcome.left,
        "faults": {kind: {"injected": injected[kind], "struck": hit[kind]} for kind in sorted(injected)},
        "bytes": outcome.bytes,
        "bytes_per_token": round(outcome.bytes / tokens, 1) if tokens else 0.0,
        "frames": outcome.frames,
        "frames_lost": outcome.lost_frames,
        "problems": outcome.problems,
    }
    if outcome.throughput:
        figures["share_of_best"] = [[round(at, 1), round(now / best, 4)] for at, now, best in outcome.throughput]
    return figures


def to_json(figures: dict[str, Any]) -> bytes:
    """The same simulation gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(figures), indent=2)


def picture(outcome: Outcome) -> bytes:
    """Tokens per second over time with the faults in it, and how long users waited between tokens, as SVG."""
    written = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "bsns", "svg.fonttype": "none"}):
        _figure(outcome).savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _figure(outcome: Outcome) -> Figure:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.8, 1))
    figure.suptitle(f"{outcome.scenario.name}: {outcome.scenario.node_count} nodes, seed {outcome.scenario.seed}")
    times_T = np.array([at for a in outcome.answers for at in a.times_s])
    width_s = max(outcome.simulated_s / BUCKETS, 1e-3)
    counts, edges = np.histogram(
        times_T, bins=max(1, round(outcome.simulated_s / width_s)), range=(0, outcome.simulated_s)
    )
    left.step(edges[:-1], counts / width_s, where="post", color=COLOURS["tokens"], label="tokens per second")
    for index, struck in enumerate(s for s in outcome.struck if s.happened):
        left.axvline(struck.fault.at_s, color=COLOURS["fault"], lw=0.8, label="faults" if index == 0 else None)
    left.set(xlabel="seconds", ylabel="tokens per second", xlim=(0, outcome.simulated_s), ylim=(0, None))
    left.legend(loc="lower right", fontsize=8)
    between_T = np.sort([after - before for a in outcome.answers for before, after in pairwise(a.times_s)])
    if len(between_T):
        right.plot(between_T * 1e3, 1 - np.arange(len(between_T)) / len(between_T), color=COLOURS["gap"])
        right.set(xscale="log", yscale="log")
    right.set(xlabel="milliseconds between two tokens", ylabel="share of tokens that waited longer")
    return figure


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 3) for p in PERCENTILES} | {
        "most": round(1e3 * max(seconds), 3)
    }
