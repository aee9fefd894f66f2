"""A plan as a picture: nodes where the network's distances put them, the chain through them, and who holds what."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bsns.core.ids import PeerId, short_names
from bsns.core.plan import Plan
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.planning.account import speeds
from bsns.planning.network import chain_problem
from bsns.planning.problem import Floats

MAX_LABELS = 40
"""Beyond so many nodes only those of the chain are named."""
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#994455", "#997700")
_OUT = "#bbbbbb"


def draw_plan(plan: Plan, snapshot: Snapshot, shape: ModelShape, file: Path) -> None:
    """Write the picture as SVG. Equal plans give equal files."""
    figure = plan_figure(plan, snapshot, shape)
    with mpl.rc_context({"svg.hashsalt": "bsns", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def plan_figure(plan: Plan, snapshot: Snapshot, shape: ModelShape) -> Figure:
    """The picture: above the network, below the row of blocks."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    network, row = figure.subplots(2, 1, height_ratios=(10, 1))
    figure.suptitle(f"{plan.model_name}: {speeds(plan)}; at most {plan.gap:.1%} from the best possible")
    _draw_network(network, plan, snapshot, shape)
    _draw_blocks(row, plan)
    return figure


def _draw_network(axes: Axes, plan: Plan, snapshot: Snapshot, shape: ModelShape) -> None:
    problem = chain_problem(snapshot, shape)
    at = dict(zip(problem.peers, _places(problem.hop_NN), strict=True))
    colour = {peer: _COLOURS[n % len(_COLOURS)] for n, stage in enumerate(plan.stages) for peer in stage.peers}
    for (one, other), link in snapshot.links.items():
        if one in at and other in at and len(at) <= MAX_LABELS:
            (x1, y1), (x2, y2) = at[one], at[other]
            width = float(np.clip(0.004 / max(link.transfer_s(shape.hidden_bytes), 1e-4), 0.2, 2.5))
            axes.plot((x1, x2), (y1, y2), color="#dddddd", linewidth=width, zorder=1)
    most = max(node.memory_bytes for node in snapshot.nodes) or 1
    for node in snapshot.nodes:
        x, y = at[node.peer]
        size = 60 + 500 * node.memory_bytes / most
        axes.scatter([x], [y], s=size, color=colour.get(node.peer, _OUT), edgecolor="black", linewidth=0.6, zorder=3)
    chain = [stage.peer for stage in plan.stages]
    for before, after, stage in zip(chain, chain[1:], plan.stages[1:], strict=False):
        axes.annotate(
            "",
            xy=at[after],
            xytext=at[before],
            arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 12, "shrinkB": 12, "linewidth": 1.4},
            zorder=4,
        )
        x, y = np.mean([at[before], at[after]], axis=0)
        axes.text(x, y, f"{stage.transfer_s * 1e3:.3g} ms", fontsize=8, ha="center", va="bottom", zorder=5)
    _name_nodes(axes, plan, snapshot, at)
    axes.set_title("distance: a token's way between nodes · area: memory · grey: left out", fontsize=9)
    axes.set_axis_off()
    axes.margins(0.15)


def _name_nodes(axes: Axes, plan: Plan, snapshot: Snapshot, at: dict[PeerId, tuple[float, float]]) -> None:
    names = short_names(at)
    for node in snapshot.nodes:
        blocks = plan.assignments.get(node.peer)
        if blocks is None and len(at) > MAX_LABELS:
            continue
        what = f"{blocks} · " if blocks is not None else ""
        axes.annotate(
            f"{names[node.peer]}\n{what}{node.block_time_s * 1e3:.3g} ms/block",
            xy=at[node.peer],
            xytext=(0, -16),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="top",
            zorder=6,
        )


def _draw_blocks(axes: Axes, plan: Plan) -> None:
    patches = []
    for number, stage in enumerate(plan.stages):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.barh(0, len(stage.blocks), left=stage.blocks.start, color=colour, edgecolor="white")
        label = f"{stage.blocks}  {(stage.compute_s + stage.transfer_s) * 1e3:.3g} ms"
        if stage.replicas:
            label += f", × {len(stage.peers)}"
        patches.append(Patch(color=colour, label=label))
    axes.set_xlim(0, plan.block_count)
    axes.set_yticks([])
    axes.set_xlabel("blocks; each stage with its time for a token")
    if len(patches) <= 16:
        axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.9), ncols=6, fontsize=8, frameon=False)


def _places(distance_NN: Floats) -> list[tuple[float, float]]:
    """Points whose distances come near `distance_NN`: classical scaling (Torgerson, Psychometrika 17, 1952)."""
    count = len(distance_NN)
    if count < 3:
        return [(float(n), 0.0) for n in range(count)]
    centring_NN = np.eye(count) - 1.0 / count
    gram_NN = -0.5 * centring_NN @ (distance_NN**2) @ centring_NN
    values, vectors = np.linalg.eigh(gram_NN)
    points_N2 = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0.0))
    points_N2 *= np.where(
        points_N2[np.abs(points_N2).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0
    )  # eigenvectors have no sign
    return [(float(x), float(y)) for x, y in _apart(points_N2[:, ::-1])]


def _apart(points_N2: Floats, steps: int = 100) -> Floats:
    """The points, scaled to a square, with those pushed apart that would lie on each other."""
    extent = float(np.ptp(points_N2, axis=0).max()) or 1.0
    placed_N2 = points_N2 / extent
    least = min(0.16, 0.8 / np.sqrt(len(placed_N2)))
    turn_N = np.arange(len(placed_N2)) * 2.4  # those in one place leave it in directions of their own
    placed_N2 = placed_N2 + 1e-3 * np.column_stack([np.cos(turn_N), np.sin(turn_N)])
    for _ in range(steps if len(placed_N2) <= 300 else 0):
        away_NN2 = placed_N2[:, None] - placed_N2[None, :]
        distance_NN = np.hypot(away_NN2[..., 0], away_NN2[..., 1]) + np.eye(len(placed_N2))
        push_NN = np.maximum(least - distance_NN, 0.0) / distance_NN / 2
        placed_N2 = placed_N2 + (push_NN[..., None] * away_NN2).sum(axis=1)
    return placed_N2
