"""Pictures of a swarm's shape: barcodes and persistence diagrams, as SVG. Equal swarms give equal pictures."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bsns.topology.distance import Floats
from bsns.topology.persistence import Diagrams

H0, H1 = "#4477aa", "#ee6677"
MOST_BARS = 200
"""Of each kind, the longest, in a barcode."""


def topology_svg(plain: Diagrams, weighted: Diagrams | None = None, title: str = "") -> bytes:
    """The picture as a file's content: a row for the distances alone, one for the node-weighted filtration."""
    written = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "bsns", "svg.fonttype": "none"}):
        topology_figure(plain, weighted, title).savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def topology_figure(plain: Diagrams, weighted: Diagrams | None = None, title: str = "") -> Figure:
    """Barcodes on the left, diagrams on the right; in milliseconds."""
    rows = [("distances alone", plain)]
    if weighted is not None:
        rows.append(("slow and small nodes enter late", weighted))
    figure = Figure(figsize=(11, 4.4 * len(rows)), layout="constrained")
    if title:
        figure.suptitle(title)
    axes_RC = np.asarray(figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1.5, 1)))
    for (name, diagrams), (left, right) in zip(rows, axes_RC, strict=True):
        _barcode(left, diagrams)
        _diagram(right, diagrams)
        left.set_title(f"bars: {name}", fontsize=10)
        right.set_title(f"diagram: {name}", fontsize=10)
    return figure


def _barcode(axes: Axes, diagrams: Diagrams) -> None:
    end_ms = _end_ms(diagrams)
    row = 0
    for points_K2, colour, name in ((diagrams.h0, H0, "clusters (H0)"), (diagrams.h1, H1, "loops (H1)")):
        bars_K2, more = _longest(points_K2 * 1e3)
        births_K, deaths_K = bars_K2.T
        axes.hlines(
            np.arange(row, row + len(bars_K2)),
            births_K,
            np.minimum(deaths_K, end_ms * 1.05),
            color=colour,
            linewidth=float(np.clip(120 / (len(bars_K2) + 1), 0.8, 3.0)),
            label=f"{name}: {len(points_K2)}" + (f", the {len(bars_K2)} longest drawn" if more else ""),
        )
        row += len(bars_K2) + 2
    axes.set_xlim(0, end_ms * 1.05)
    axes.set_ylim(row - 1, -1)  # the first bar on top
    axes.set_yticks([])
    axes.set_xlabel("distance, ms for one token")
    axes.legend(loc="lower left", fontsize=8)


def _diagram(axes: Axes, diagrams: Diagrams) -> None:
    end_ms = _end_ms(diagrams)
    top_ms = end_ms * 1.12
    axes.plot((0, top_ms), (0, top_ms), color="#999999", linewidth=0.8)
    axes.axhline(end_ms * 1.06, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate("never", (top_ms * 0.99, end_ms * 1.06), fontsize=8, ha="right", va="bottom", color="#666666")
    for points_K2, colour, marker, name in ((diagrams.h0, H0, "o", "clusters"), (diagrams.h1, H1, "^", "loops")):
        births_K, deaths_K = points_K2.T * 1e3
        axes.scatter(
            births_K,
            np.where(np.isfinite(deaths_K), deaths_K, end_ms * 1.06),
            color=colour,
            marker=marker,
            s=22,
            alpha=0.7,
            label=name,
            clip_on=False,
            zorder=3,
        )
    axes.set_xlim(0, top_ms)
    axes.set_ylim(0, top_ms)
    axes.set_aspect("equal")
    axes.set_xlabel("born, ms")
    axes.set_ylabel("ended, ms")
    axes.legend(loc="lower right", fontsize=8)


def _end_ms(diagrams: Diagrams) -> float:
    """Where the last finite thing happens."""
    values = np.concatenate([diagrams.h0.ravel(), diagrams.h1.ravel()])
    return float(values[np.isfinite(values)].max(initial=0.0)) * 1e3 or 1.0


def _longest(points_K2: Floats) -> tuple[Floats, bool]:
    """The longest bars, in order of birth and then of length."""
    lives_K = points_K2[:, 1] - points_K2[:, 0]
    kept_K = np.argsort(-lives_K, kind="stable")[:MOST_BARS]
    bars_K2 = points_K2[np.sort(kept_K)]
    order_K = np.lexsort((bars_K2[:, 1], bars_K2[:, 0]))
    return bars_K2[order_K], len(points_K2) > MOST_BARS
