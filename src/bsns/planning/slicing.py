"""Slicing: the best cut of a topological order into consecutive pieces, one for each machine at most.

SliceGraph (Archer et al., ICML 2024, arXiv 2311.03703): dp[b][j] = min over l of max(dp[b−1][l], f(l..j)) over prefix
lengths. Only prefixes are looked at that b pieces can compute and that leave no more than the other pieces can, within
what is already reached; and only pieces whose work alone does not exceed that. Neither prunes anything better, so the
result is that of the plain recurrence.

Suffixes say the axes: P orders, V operators, J prefix lengths.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from bsns.planning.graph import Fleet, Floats, Ints, OperatorGraph
from bsns.planning.segments import Segments

CELLS = 1 << 19
"""Costs held at a time: 4 MiB, so that they stay in the cache."""


def slice_orders(graph: OperatorGraph, orders_PV: Ints, fleet: Fleet, at_most_s: float = math.inf) -> Floats:
    """The least bottleneck (P,) of cutting each order into at most `fleet.machines` pieces; inf where that exceeds
    `at_most_s`. The lower the limit, the faster."""
    if math.isfinite(at_most_s):
        return _within(graph, orders_PV, fleet, at_most_s)
    best_P = np.full(len(orders_PV), math.inf)
    limit_s = 1.1 * max(float(graph.work_V.sum()) / fleet.machines, float(graph.work_V.max()), 1e-12)
    most_s = ceiling_s(graph, fleet)
    while (todo := np.flatnonzero(np.isinf(best_P))).size:
        best_P[todo] = _within(graph, orders_PV[todo], fleet, limit_s)
        if limit_s >= most_s:
            break
        limit_s *= 1.25
    return best_P


def best_slice(graph: OperatorGraph, order_V: Ints, fleet: Fleet) -> tuple[float, Ints]:
    """The least bottleneck of one order, and each operator's piece, numbered along the order. inf: it cannot fit."""
    cost_s = float(slice_orders(graph, order_V[None], fleet)[0])
    part_V = np.zeros(graph.count, dtype=np.intp)
    if math.isfinite(cost_s):
        # the same sums in another order may come out a little larger
        pieces = Segments(graph, order_V[None], fleet)
        for piece, (start, end) in enumerate(pairwise(_ends_within(pieces, cost_s * (1 + 1e-9)))):
            part_V[order_V[start:end]] = piece
    return cost_s, part_V


def ceiling_s(graph: OperatorGraph, fleet: Fleet) -> float:
    """What no piece of any order exceeds, but for those that are impossible."""
    io_s = 2 * float(graph.sent_V.sum()) / fleet.bytes_per_s
    over_s = 0.0 if fleet.hard_memory else float(fleet.overflow_s(graph.param_V.sum() + graph.peak_V.max()))
    return float(graph.work_V.sum()) + io_s + over_s + 1e-12


def _within(graph: OperatorGraph, orders_PV: Ints, fleet: Fleet, limit_s: float) -> Floats:
    """Least bottlenecks (P,), inf where they exceed the limit; a few orders at a time."""
    slack_s = limit_s * (1 + 1e-9)
    best_P = np.full(len(orders_PV), math.inf)
    at_once, start = 1, 0
    while start < len(orders_PV):
        pieces = Segments(graph, orders_PV[start : start + at_once], fleet)
        cells, costs_P = _least(pieces, slack_s)
        best_P[start : start + at_once] = costs_P
        start += at_once
        at_once = max(1, CELLS * at_once // max(cells, 1))
    best_P[best_P > slack_s] = math.inf
    return best_P


def _windows(pieces: Segments, limit_s: float) -> list[range]:
    """For b = 0 … machines pieces, which prefixes they can compute within the limit, leaving what the others can."""
    least_J, most_J = pieces.done_PJ.min(axis=0), pieces.done_PJ.max(axis=0)
    total_s, count, machines = float(most_J[-1]), pieces.count, pieces.fleet.machines
    windows = [range(0, 1)]
    for b in range(1, machines + 1):
        first = int(np.searchsorted(most_J, total_s - (machines - b) * limit_s - 1e-9 * total_s))
        last = int(np.searchsorted(least_J, b * limit_s, side="right")) - 1
        windows.append(range(max(windows[-1].start, first), min(last, count) + 1))
    return windows


def _least(pieces: Segments, limit_s: float) -> tuple[int, Floats]:
    """How many costs had to be held, and the least bottlenecks (P,)."""
    windows = _windows(pieces, limit_s)
    if not all(windows):
        return 1, np.full(len(pieces.orders_PV), math.inf)
    width = pieces.longest(limit_s)
    orders, count = pieces.orders_PV.shape
    blocks = max(len(before) * len(now) for before, now in pairwise(windows))
    # a block takes about as long to set up as 10,000 cells
    if pieces.blocks_allowed and sum(len(a) * len(b) + 10_000 for a, b in pairwise(windows)) < 2 * width * count:
        rows = _by_blocks(pieces, windows)
        return blocks * orders, np.minimum.reduce([row_PJ[:, -1] for row_PJ in rows if row_PJ.shape[1] == count + 1])
    rows = _by_band(pieces.band(width), windows)
    return width * orders * count, np.minimum.reduce([row_PJ[:, -1] for row_PJ in rows])


def _by_blocks(pieces: Segments, windows: list[range]) -> list[Floats]:
    """dp[b] (P, J) for b = 1 …, as far as its window goes."""
    orders = len(pieces.orders_PV)
    before_PL = np.zeros((orders, 1))
    rows = []
    for starts, ends in pairwise(windows):
        now_PJ = np.maximum(before_PL[:, :, None], pieces.block(starts, ends)).min(axis=1)
        row_PJ = np.full((orders, ends.stop), math.inf)
        row_PJ[:, ends.start :] = now_PJ
        rows.append(row_PJ)
        before_PL = now_PJ
    return rows


def _by_band(band_DPV: Floats, windows: list[range]) -> list[Floats]:
    """dp[b] (P, J) for b = 1 …, for all prefixes; inf outside the windows."""
    width, orders, count = band_DPV.shape
    # prefixes lie `width` further right, so that pieces that would begin before the order find inf there
    before_PJ = np.full((orders, width + count + 1), math.inf)
    before_PJ[:, width] = 0.0
    rows = []
    for ends in windows[1:]:
        first, last = max(ends.start, 1), ends.stop - 1
        now_PJ = np.full_like(before_PJ, math.inf)
        step = before_PJ.strides[1]
        # [d, p, j] = before[p, first + j − d − 1]: what prefix `first + j` was before its last d + 1 operators
        window_DPJ = np.lib.stride_tricks.as_strided(
            before_PJ[:, width + first - 1 :],
            shape=(width, orders, max(last - first + 1, 0)),
            strides=(-step, before_PJ.strides[0], step),
            writeable=False,
        )
        if first <= last:
            worst_DPJ = np.maximum(window_DPJ, band_DPV[:, :, first - 1 : last])
            now_PJ[:, width + first : width + last + 1] = worst_DPJ.min(axis=0)
        rows.append(now_PJ[:, width:])
        before_PJ = now_PJ
    return rows


def _ends_within(pieces: Segments, limit_s: float) -> list[int]:
    """Where the pieces of the first order end, from 0 on, none costing more than the limit; as few as reach it."""
    band_DPV = pieces.band(pieces.longest(limit_s))
    rows = _by_band(band_DPV, _windows(pieces, limit_s))
    fewest = next(b for b, row_PJ in enumerate(rows) if row_PJ[0, -1] <= limit_s)
    ends = [pieces.count]
    for b in range(fewest, -1, -1):
        end = ends[-1]
        lengths = range(min(len(band_DPV), end))
        start = next(
            end - d - 1
            for d in lengths
            if band_DPV[d, 0, end - 1] <= limit_s and (rows[b - 1][0, end - d - 1] <= limit_s if b else d + 1 == end)
        )
        ends.append(start)
    return ends[::-1]
