"""`bsns plan`: who should hold which blocks, how fast that will be, and how far from the best possible it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bsns.cli.console import Dtype, JsonFlag, Say, chosen_invite, doing, emit, parse_seconds, run, say_aside
from bsns.cli.files import is_shape_file, read_file, read_shape, write_file
from bsns.cli.plan_table import as_dict, footprints, show
from bsns.cli.routing_options import WEIGHTS_HELP
from bsns.core.errors import BadOption, MissingBlocks
from bsns.core.plan import LEAST_CACHE_TOKENS, Objective, Plan
from bsns.core.snapshot import ModelShape, Snapshot

if TYPE_CHECKING:
    from numpy.random import Generator

    from bsns.node.trial import Trial
    from bsns.planning.problem import Chain
    from bsns.planning.schemas import Library

SCHEMAS = 3
"""How many of the nearest schemas are looked at."""
SCHEMA_GAP = 0.1
"""A schema's plan farther than this from the lower bound is replaced by a fresh search."""


@dataclass(frozen=True, slots=True)
class Present:
    """The swarm as it is: what is predicted of the route it offers, and what that does."""

    predicted_tokens_per_s: float | None
    trial: Trial


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="As for the other verbs, or a .json file with the shape of a model."),
    ],
    join: Annotated[
        str | None, typer.Option("--join", envvar="BSNS_INVITE", metavar="INVITE", help="Plan for this swarm.")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option("--snapshot", metavar="FILE", help="Plan for the swarm in a snapshot file.")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME", help="throughput, latency, or mixed.")
    ] = "throughput",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="TEXT", help=WEIGHTS_HELP),
    ] = None,
    deadline: Annotated[str, typer.Option("--deadline", metavar="TIME", help="How long to search.")] = "2s",
    schemas: Annotated[
        Path | None,
        typer.Option("--schemas", metavar="FILE", help="Start from plans for similar swarms (bsns schemas build)."),
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option("--cache-tokens", min=1, metavar="N", help="KV cache each node promises, in tokens.")
    ] = LEAST_CACHE_TOKENS,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Precision of the weights; auto: as the swarm does.")
    ] = "auto",
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Of the search. What it finds also depends on how far it gets before the deadline."
        ),
    ] = 0,
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="With --join: generate a few tokens, to compare (not a shape).")
    ] = True,
    save_snapshot: Annotated[
        Path | None, typer.Option("--save-snapshot", metavar="FILE", help="Keep the snapshot that was planned for.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the plan.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Plan which node should hold which blocks, and say how far the plan is from the best possible.

    It changes nothing: nodes follow the plans of the swarm's own orchestrator, which plans in the same way.

    Example:
      bsns plan smollm2-135m --join bsns1-…
      bsns plan smollm2-135m --snapshot office.json --objective latency --svg plan.svg
    """

    async def verb() -> None:
        invite = chosen_invite(context, join, instead=snapshot is not None)
        if (invite is None) == (snapshot is None):
            raise BadOption("give either --join INVITE for a running swarm or --snapshot FILE")
        if weights is not None and schemas is not None:
            raise BadOption("give either --weights or --schemas: the plans of schemas are made for an objective alone")
        wanted, deadline_s = Objective.named(objective), parse_seconds(deadline)
        with doing("loading libraries", quiet=as_json) as say:
            present: Present | None = None
            if invite is not None:
                seen, shape, present = await _ask_swarm(model, invite, dtype, say, trial=trial)
            else:
                assert snapshot is not None
                seen, shape = Snapshot.from_json(read_file(snapshot)), await asyncio.to_thread(read_shape, model, dtype)
            if save_snapshot is not None:
                write_file(save_snapshot, seen.to_json())
            say("planning")
            client_s = present.trial.client_s if present else 0.0
            asked = _Asked(wanted, weights, schemas, cache_tokens, client_s, seed)
            made = await asyncio.to_thread(_make, seen, shape, asked, deadline_s)
            if svg is not None:
                say("drawing")
                await asyncio.to_thread(_draw, made, seen, shape, svg)
        memory = footprints(made, seen, shape, cache_tokens)
        if as_json:
            emit(as_dict(made, present, memory))
        else:
            show(made, seen, present, memory)

    run(verb(), as_json=as_json)


async def _ask_swarm(
    model: str, invite: str, dtype: Dtype, say: Say, *, trial: bool
) -> tuple[Snapshot, ModelShape, Present | None]:
    """The swarm's snapshot, the model's shape, and what the swarm does as it is, where it can be tried."""
    from bsns.node.snapshots import observe_snapshot

    say("asking the swarm")
    seen = await observe_snapshot(invite)
    shape = await asyncio.to_thread(read_shape, model, dtype, [node.dtype for node in seen.nodes])
    if not trial or is_shape_file(model):
        return seen, shape, None
    from bsns.node.client import Client
    from bsns.node.trial import predicted_tokens_per_s, try_out

    say("trying the swarm as it is")
    tried: Trial | None = None
    try:
        async with Client(invite, model) as client:
            tried = await try_out(client)
    except MissingBlocks as error:  # an incomplete swarm is just what one plans for
        say_aside(f"the swarm cannot be tried as it is: {error.message}")
    if tried is None:
        return seen, shape, None
    return seen, shape, Present(predicted_tokens_per_s(tried.route, seen, shape, tried.client_s), tried)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be planned for."""

    objective: Objective
    weights: str | None
    schemas: Path | None
    cache_tokens: int
    client_s: float
    seed: int


def _make(seen: Snapshot, shape: ModelShape, asked: _Asked, deadline_s: float) -> Plan:
    """The plan, searched for so long. Loading the engines, a second and more on a busy machine, is no part of that."""
    import numpy as np

    from bsns.planning.planner import make_plan, plan_by_weights
    from bsns.planning.selection import Weights

    library = _library(asked)
    until_s = time.monotonic() + deadline_s

    def remaining_s() -> float:
        return until_s - time.monotonic()

    objective, cache_tokens, client_s = asked.objective, asked.cache_tokens, asked.client_s
    rng = np.random.default_rng(asked.seed)
    if asked.weights is not None:
        weights = Weights.parse(asked.weights)
        return plan_by_weights(
            seen,
            shape,
            weights,
            objective=objective,
            cache_tokens=cache_tokens,
            client_s=client_s,
            rng=rng,
            remaining_s=remaining_s,
        )
    warm: list[Chain] = []
    how = ""
    if library is not None:
        warm, how = _from_schemas(seen, shape, asked, library, rng, lambda: remaining_s() / 2)
    made = make_plan(
        seen,
        shape,
        objective=objective,
        cache_tokens=cache_tokens,
        client_s=client_s,
        rng=rng,
        remaining_s=remaining_s,
        warm=warm,
    )
    return replace(made, method=made.method + how)


def _library(asked: _Asked) -> Library | None:
    """The schemas to start from, where some were given."""
    if asked.schemas is None:
        return None
    from bsns.planning.schema_file import from_json

    return from_json(read_file(asked.schemas))


def _from_schemas(
    seen: Snapshot, shape: ModelShape, asked: _Asked, library: Library, rng: Generator, remaining_s: Callable[[], float]
) -> tuple[list[Chain], str]:
    """The chain that the schema library leads to, nodes numbered as in the snapshot, and how it came about."""
    from bsns.planning.problem import Stage
    from bsns.planning.schemas import lookup

    if library.objective != asked.objective:
        say_aside(
            f"the schemas were planned for {library.objective.name}, not for {asked.objective.name}: they serve "
            "as beginnings only, and what they lead to is judged as asked"
        )
    found = lookup(
        library,
        seen,
        shape,
        asked.objective,
        SCHEMAS,
        rng,
        remaining_s,
        SCHEMA_GAP,
        cache_tokens=asked.cache_tokens,
        client_s=asked.client_s,
    )
    number = {node.peer: n for n, node in enumerate(seen.nodes)}
    chain = tuple(Stage(number[found.problem.peers[node]], start, end) for node, start, end in found.chain)
    what = {
        "taken": "the nearest was taken",
        "refined": "the nearest was refined",
        "fresh": "none was good enough, so a fresh search was made",
    }
    return [chain], f" (of {len(library.schemas)} schemas {what[found.how]})"


def _draw(made: Plan, seen: Snapshot, shape: ModelShape, svg: Path) -> None:
    from bsns.cli.plan_picture import draw_plan

    try:
        draw_plan(made, seen, shape, svg)
    except OSError as error:
        raise BadOption(f"{svg} cannot be written: {error.strerror}") from None
