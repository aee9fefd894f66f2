"""`bsns topology`: the shape of a swarm's network, in words and as a picture."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bsns.cli.console import JsonFlag, chosen_invite, doing, emit, out, run, tell
from bsns.cli.files import read_file, write_file
from bsns.core.errors import BadOption
from bsns.core.snapshot import Snapshot
from bsns.core.words import several

if TYPE_CHECKING:
    from bsns.topology.distance import Distances
    from bsns.topology.persistence import Diagrams
    from bsns.topology.summary import Summary

REST = " (--json names them)"
MOST_NODES = 10_000


def topology(
    context: typer.Context,
    join: Annotated[
        str | None, typer.Option("--join", envvar="BSNS_INVITE", metavar="INVITE", help="Look at this swarm.")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option("--snapshot", metavar="FILE", help="Look at the swarm in a snapshot file.")
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            "--synthetic",
            metavar="KIND:NODES:SEED",
            help="Look at a random swarm: lan_wan, scale_free or uniform, e.g. lan_wan:40:1.",
        ),
    ] = None,
    save_snapshot: Annotated[
        Path | None, typer.Option("--save-snapshot", metavar="FILE", help="Keep the snapshot that was looked at.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw barcodes and diagrams.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show which nodes of a swarm lie near each other, how far the clusters lie apart, and which ways form loops.

    Example:
      bsns topology --join bsns1-…
      bsns topology --synthetic lan_wan:40:1 --svg shape.svg --save-snapshot office.json
    """

    async def verb() -> None:
        instead = snapshot is not None or synthetic is not None
        invite = chosen_invite(context, join, instead=instead)
        if sum(given is not None for given in (invite, snapshot, synthetic)) != 1:
            raise BadOption("give one of --join INVITE, --snapshot FILE, and --synthetic KIND:NODES:SEED")
        with doing("loading libraries", quiet=as_json) as say:
            if invite is not None:
                from bsns.node.snapshots import observe_snapshot

                say("asking the swarm")
                seen = await observe_snapshot(invite)
            elif synthetic is not None:
                seen = await asyncio.to_thread(drawn, synthetic)
            else:
                assert snapshot is not None
                seen = Snapshot.from_json(read_file(snapshot))
            if save_snapshot is not None:
                write_file(save_snapshot, seen.to_json())
            say("computing")
            known, plain, weighted, told = await asyncio.to_thread(_shape, seen)
            if svg is not None:
                say("drawing")
                await asyncio.to_thread(_draw, plain, weighted, len(seen.nodes), svg)
        if as_json:
            emit(as_dict(known, plain, weighted, told))
        else:
            show(known, told)

    run(verb(), as_json=as_json)


def drawn(text: str) -> Snapshot:
    """The random swarm that `KIND:NODES:SEED` asks for. Raises BadOption."""
    import numpy as np

    from bsns.topology.synthetic import KINDS, synthetic

    kind, _, rest = text.partition(":")
    nodes, _, seed = rest.partition(":")
    known = {name: name for name in KINDS}
    try:
        count, number = int(nodes), int(seed or 0)
    except ValueError:
        raise BadOption(f"{text!r} is no random swarm; write KIND:NODES:SEED, for example lan_wan:40:1") from None
    if kind not in known or not 0 < count <= MOST_NODES or number < 0:
        raise BadOption(
            f"{text!r}: the kind is {', '.join(KINDS)}, nodes are 1 to {MOST_NODES}, and the seed from 0 on"
        )
    return synthetic(known[kind], count, np.random.default_rng(number))


def show(known: Distances, told: Summary) -> None:
    """Print the shape for people."""
    from bsns.topology.summary import clusters_in_words, loops_in_words

    count = known.node_count
    if count == 1:
        tell("one node: a network of one has no shape")
        return
    apart_ms = known.matrix_MM[known.matrix_MM > 0] * 1e3
    if len(apart_ms):
        tell(f"{count} nodes; a token takes {apart_ms.min():.3g} to {apart_ms.max():.3g} ms from one to another")
    for line in (*clusters_in_words(told, REST), *loops_in_words(told, REST)):
        tell(line)
    if len(told.steps) > 1:
        view = Table("joined up to", "clusters", "loops open", box=SIMPLE_HEAD)
        for distance_s, groups, loops in told.steps:
            view.add_row(f"{distance_s * 1e3:.3g} ms", str(groups), str(loops))
        out.print(view)
    for note in known.assumptions:
        tell(f"assumed: {note}", style="dim")


def as_dict(known: Distances, plain: Diagrams, weighted: Diagrams, told: Summary) -> dict[str, Any]:
    """The shape as `--json` prints it; an infinite death is null."""
    return {
        "nodes": known.node_count,
        "looked_at": len(known.index_M),
        "clusters": [list(group) for group in told.clusters],
        "within_ms": told.within_s * 1e3,
        "between_ms": told.between_s * 1e3,
        "loops": [{"opens_ms": loop.opens_s * 1e3, "closes_ms": loop.closes_s * 1e3} for loop in told.loops],
        "brief_loops": told.brief_loops,
        "steps": [{"ms": at * 1e3, "clusters": groups, "loops": loops} for at, groups, loops in told.steps],
        "diagrams_ms": {
            name: {"h0": _points(diagrams.h0.tolist()), "h1": _points(diagrams.h1.tolist())}
            for name, diagrams in (("plain", plain), ("weighted", weighted))
        },
        "assumptions": list(known.assumptions),
    }


def _points(points: list[list[float]]) -> list[list[float | None]]:
    return [[born * 1e3, died * 1e3 if died < float("inf") else None] for born, died in points]


def _shape(seen: Snapshot) -> tuple[Distances, Diagrams, Diagrams, Summary]:
    from bsns.topology.distance import distances
    from bsns.topology.persistence import node_entries, persistence
    from bsns.topology.summary import summary

    known = distances(seen)
    plain = persistence(known.matrix_MM)
    weighted = persistence(known.matrix_MM, node_entries([seen.nodes[number] for number in known.index_M]))
    return known, plain, weighted, summary(known, plain, seen)


def _draw(plain: Diagrams, weighted: Diagrams, nodes: int, svg: Path) -> None:
    from bsns.topology.plots import topology_svg

    picture = topology_svg(plain, weighted, several(nodes, "node"))
    write_file(svg, picture)
