"""`bsns schemas`: plans made beforehand for swarms of many shapes, kept in one file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bsns.cli.console import Dtype, JsonFlag, Say, doing, emit, out, parse_seconds, run, tell
from bsns.cli.files import read_file, read_shape, write_file
from bsns.core.errors import BadSnapshot
from bsns.core.plan import LEAST_CACHE_TOKENS, Objective
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.core.words import several, size

if TYPE_CHECKING:
    import numpy as np

    from bsns.planning.schemas import Library

app = typer.Typer(no_args_is_help=True, help="Plans made beforehand for swarms of many shapes.")

SYNTHETIC = "synthetic"
FEWEST_NODES, MOST_NODES = 4, 64
"""Of synthetic swarms, as many of each size as of its double."""
MOST_SWARMS = 10_000
MOST_SHOWN = 30


@app.callback()
def _schemas() -> None:
    """Plans made beforehand for swarms of many shapes."""


@app.command()
def build(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="As for the other verbs, or a .json file with the shape of a model."),
    ],
    topologies: Annotated[
        str,
        typer.Option(
            "--topologies", metavar="FILE|synthetic", help="A file with a snapshot or a list of them, or random swarms."
        ),
    ] = SYNTHETIC,
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to keep them.")] = Path("schemas.json"),
    count: Annotated[
        int, typer.Option("--count", min=1, max=MOST_SWARMS, metavar="N", help="How many random swarms.")
    ] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random swarms and the searches.")] = 0,
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME", help="throughput, latency, or mixed.")
    ] = "throughput",
    deadline: Annotated[str, typer.Option("--deadline", metavar="TIME", help="How long to search for each.")] = "1s",
    cache_tokens: Annotated[
        int, typer.Option("--cache-tokens", min=1, metavar="N", help="KV cache each node promises, in tokens.")
    ] = LEAST_CACHE_TOKENS,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of the weights; auto: bfloat16.")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Plan a model for many swarms, and keep the plans for swarms like them.

    Example:
      bsns schemas build smollm2-135m --topologies synthetic --count 60 --out schemas.json
    """

    async def verb() -> None:
        wanted, deadline_s = Objective.named(objective), parse_seconds(deadline)
        with doing("loading libraries", quiet=as_json) as say:
            import numpy as np

            from bsns.planning.schema_file import to_json

            rng = np.random.default_rng(seed)
            shape = await asyncio.to_thread(read_shape, model, dtype)
            swarms = drawn(count, shape, rng) if topologies == SYNTHETIC else read_swarms(read_file(Path(topologies)))
            library = await asyncio.to_thread(_build, shape, swarms, wanted, rng, deadline_s, cache_tokens, say)
            content = to_json(library)
            write_file(out_file, content)
        if as_json:
            emit(as_dict(library) | {"file": str(out_file), "bytes": len(content)})
            return
        kept = several(len(library.schemas), "schema")
        tell(f"{kept} of {library.model_name} for {library.objective.name} in {out_file} ({size(len(content))})")
        if library.skipped:
            have = "has" if library.skipped == 1 else "have"
            tell(f"{library.skipped} of {len(swarms)} swarms {have} too little memory: skipped", style="yellow")

    run(verb(), as_json=as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="As bsns schemas build wrote it.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a file of schemas holds.

    Example:
      bsns schemas show schemas.json
    """

    async def verb() -> None:
        from bsns.planning.schema_file import from_json

        library = from_json(read_file(file))
        if as_json:
            emit(as_dict(library))
            return
        what = (
            f"{library.model_name}, {several(library.block_count, 'block')}, {several(len(library.schemas), 'schema')}"
        )
        view = Table(
            *("nodes", "typical distance", "loops", "stages", "heaviest role"),
            title=Text(f"{what}, planned for {library.objective.name}"),
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        for schema in library.schemas[:MOST_SHOWN]:
            widest = max(schema.roles, key=lambda role: role.time * (role.end - role.start))
            blocks = several(widest.end - widest.start, "block")
            view.add_row(
                str(schema.node_count),
                f"{schema.like.signature.scale_s * 1e3:.3g} ms",
                str(len(schema.like.signature.plain.h1)),
                str(len(schema.roles)),
                f"{blocks} on a node {1 / widest.time:.2g} × as fast as the median",
            )
        out.print(view)
        if len(library.schemas) > MOST_SHOWN:
            tell(f"and {len(library.schemas) - MOST_SHOWN} more (--json has all)")

    run(verb(), as_json=as_json)


def drawn(count: int, shape: ModelShape, rng: np.random.Generator) -> list[Snapshot]:
    """Random swarms of every kind and of many sizes, with memories that make the model a tight fit."""
    from bsns.topology.synthetic import KINDS, synthetic

    ratio = MOST_NODES / FEWEST_NODES
    sizes = [round(FEWEST_NODES * ratio ** rng.uniform()) for _ in range(count)]
    return [
        synthetic(KINDS[number % len(KINDS)], nodes, rng, model_bytes=float(sum(shape.block_bytes)) or 1.0)
        for number, nodes in enumerate(sizes)
    ]


def read_swarms(text: bytes) -> list[Snapshot]:
    """The snapshots in a file: one, or a list of them. Raises BadSnapshot."""
    import msgspec

    if not text.lstrip().startswith(b"["):
        return [Snapshot.from_json(text)]
    try:
        entries = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSnapshot(f"this is no list of snapshots: {error}") from None
    if not 0 < len(entries) <= MOST_SWARMS:
        raise BadSnapshot(f"a list of {len(entries)} snapshots; give 1 to {MOST_SWARMS}")
    return [Snapshot.from_json(bytes(entry)) for entry in entries]


def as_dict(library: Library) -> dict[str, Any]:
    """A library as `--json` prints it."""
    return {
        "model": library.model_name,
        "blocks": library.block_count,
        "objective": {"bottleneck": library.objective.bottleneck, "latency": library.objective.latency},
        "skipped": library.skipped,
        "schemas": [
            {
                "nodes": schema.node_count,
                "scale_ms": schema.like.signature.scale_s * 1e3,
                "loops": len(schema.like.signature.plain.h1),
                "value_ms": schema.value_s * 1e3,
                "roles": [
                    {
                        "range": f"{role.start}:{role.end}",
                        "time": role.time,
                        "memory": role.memory,
                        "distance": role.distance,
                        "next_hop": role.next_hop,
                    }
                    for role in schema.roles
                ],
            }
            for schema in library.schemas
        ],
    }


def _build(
    shape: ModelShape,
    swarms: list[Snapshot],
    objective: Objective,
    rng: np.random.Generator,
    deadline_s: float,
    cache_tokens: int,
    say: Say,
) -> Library:
    from bsns.planning.schemas import build as build_library

    def clock() -> Callable[[], float]:
        end_s = time.monotonic() + deadline_s
        return lambda: end_s - time.monotonic()

    return build_library(
        shape,
        swarms,
        objective=objective,
        rng=rng,
        clock=clock,
        cache_tokens=cache_tokens,
        told=lambda done: say(f"planning swarm {done + 1} of {len(swarms)}", done / len(swarms)),
    )
