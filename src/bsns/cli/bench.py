"""`bsns bench`: measurements that a stranger can repeat."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from bsns.cli.console import EXIT_FAILED, JsonFlag, a_number, doing, emit, err, out, run
from bsns.core.errors import BadOption

app = typer.Typer(no_args_is_help=True, help="Measure this machine. Every verb takes --json.")

MOST_MINUTES = 7 * 24 * 60
QuickFlag = Annotated[bool, typer.Option("--quick", help="The same figures, less exact, in a fraction of the time.")]


@app.callback()
def _bench() -> None:
    """Measure this machine. Every verb takes --json."""


@app.command()
def decode(
    model: Annotated[str, typer.Argument(help="The model to measure with.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16, for all rows.")] = "bfloat16",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads per process, for all rows.")] = 1,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Decoding speed: the model library, our engine in one process, and swarms of 2 and 3 nodes on this machine.

    Example: bsns bench decode --quick
    """

    async def verb() -> None:
        from bsns.bench.decode import bench_decode

        with doing("starting", quiet=as_json) as update:
            figures = await bench_decode(model, dtype=dtype, threads=threads, quick=quick, told=update)
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


@app.command()
def engine(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="135m, 1.1b or smollm2-135m; may be repeated. Default: all.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option("--format", help="fp32, bf16, int8 or int4; may be repeated. Default: all.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads, for all rows.")] = 2,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Executors side by side: native, torch, the model library, and llama.cpp where BSNS_LLAMA_CPP names a build.

    The full form takes about an hour, and says on standard error how it goes.

    Example: bsns bench engine --quick --model smollm2-135m
    """

    async def verb() -> None:
        from bsns.bench.engine import FORMATS, MODELS, bench_engine

        models, formats = _chosen("model", model, MODELS), _chosen("format", form, FORMATS)
        rounds, least_s = (1, 0.2) if quick else (5, 1.0)
        with reporting() as told:
            figures = await asyncio.to_thread(
                bench_engine, models, formats, threads=threads, rounds=rounds, least_s=least_s, told=told
            )
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


@app.command()
def compress(
    part: Annotated[
        list[str] | None, typer.Option("--part", help="wire, weights, kv or ttft; may be repeated. Default: all.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads of this process.")] = 1,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What fewer bits cost and save, against 16: on the wire, in the weights, in the cache.

    The part ttft emulates a network, which needs root.

    Example: bsns bench compress --part wire --quick
    """

    async def verb() -> None:
        from bsns.bench.compress import PARTS, bench_compress

        parts = _chosen("part", part, PARTS)
        with reporting() as told:
            figures = await bench_compress(parts, threads=threads, quick=quick, told=told)
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


@app.command()
def plan(
    part: Annotated[
        list[str] | None, typer.Option("--part", help="chain, dag or ablation; may be repeated. Default: all.")
    ] = None,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Plans beside the best possible and beside others' rules: chains, graphs, and whether the network's shape helps.

    The full form takes about an hour; --part runs one suite alone.

    Example: bsns bench plan --part chain --quick
    """

    async def verb() -> None:
        from bsns.bench.plan import PARTS, bench_plan

        parts = _chosen("part", part, PARTS)
        with doing("starting", quiet=as_json) as update:
            figures = await asyncio.to_thread(bench_plan, parts, quick=quick, told=update)
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


@app.command()
def swarm(
    model: Annotated[str, typer.Argument(help="The model to measure with.")] = "smollm2-135m",
    settings: Annotated[int | None, typer.Option("--settings", min=1, help="Random swarms; 10, or 2 if quick.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same swarms.")] = 0,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Planned layouts against an equal split, predicted and measured: unequal nodes in an emulated network.

    Needs root, for network namespaces. The full form takes some 16 minutes.

    Example: sudo bsns bench swarm --quick
    """

    async def verb() -> None:
        from bsns.bench.emulation import hindrance

        if (problem := hindrance()) is not None:
            raise BadOption(problem)
        from bsns.bench.swarm import bench_swarm

        count = settings or (2 if quick else 10)
        with doing("starting", quiet=as_json) as update:
            figures = await bench_swarm(model, settings=count, seed=seed, quick=quick, told=update)
        if as_json:
            emit(figures)
        else:
            out.print(_swarm_table(figures))
            out.print(_table(figures["summary"]))

    run(verb(), as_json=as_json)


@app.command()
def survive(
    model: Annotated[str, typer.Argument(help="The model to measure with.")] = "smollm2-135m",
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same failures.")] = 0,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Answers over real nodes that are killed, stopped, cut off, slowed and made to lie: gaps, and changes of tokens.

    Cutting a node off needs root, for network namespaces; without, that is left out, and said. The full form takes some
    20 minutes, and says on standard error how it goes.

    Example: bsns bench survive --quick
    """

    async def verb() -> None:
        from bsns.bench.survive import bench_survive

        with reporting() as told:
            figures = await bench_survive(model, quick=quick, seed=seed, told=told)
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


@app.command()
def soak(
    model: Annotated[str, typer.Argument(help="The model to answer with.")] = "smollm2-135m",
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.1, max=MOST_MINUTES, callback=a_number, metavar="N", help="How long.")
    ] = 30.0,
    streams: Annotated[int, typer.Option("--streams", min=1, metavar="N", help="How many answers at once.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same nodes to go.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32 or bfloat16; only in float32 are answers compared.")
    ] = "float32",
    as_json: JsonFlag = False,
) -> None:
    """Many answers for a long time, over eight real nodes that leave, are killed and come back.

    Fails if an answer is wrong or cut short, if a process grows, or if a session is not freed.

    Example: bsns bench soak --minutes 2
    """
    passed = False

    async def verb() -> None:
        nonlocal passed
        from bsns.bench.soak import bench_soak

        with reporting() as told:
            figures = await bench_soak(model, minutes=minutes, streams=streams, seed=seed, dtype=dtype, told=told)
        passed = figures["passed"]
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)
    if not passed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="The model to measure with. Default: smollm2-135m, and 1.1b, a shape, for rivals."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option("--part", help="table2, load or rivals; may be repeated. Default: all.")
    ] = None,
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What people get: the paper's Table 2 (six nodes over three networks), chats through a gateway under load, and the
    same model through others' programs.

    Table 2 needs root, for network namespaces, and the load OpenAI's client; what cannot be is left out, and said, as
    are rivals that are not installed. The full form takes some 50 minutes, and says on standard error how it goes.

    Example: sudo bsns bench serve --part table2 --quick
    """

    async def verb() -> None:
        from bsns.bench.serve import PARTS, bench_serve

        parts = _chosen("part", part, PARTS)
        with reporting() as told:
            figures = await bench_serve(model, parts=parts, quick=quick, told=told)
        if as_json:
            emit(figures)
        else:
            out.print(_table(figures))

    run(verb(), as_json=as_json)


def _chosen(what: str, asked: list[str] | None, known: Collection[str]) -> list[str]:
    """What was asked for, or all there is. Raises BadOption for what is not known."""
    if unknown := set(asked or ()) - set(known):
        raise BadOption(f"there is no {what} {sorted(unknown)[0]!r}; use {', '.join(known)}")
    return asked or list(known)


@contextlib.contextmanager
def reporting() -> Iterator[Callable[[str], None]]:
    """For what takes long: how it goes, on standard error; a spinner in a terminal, else a line each, with the time."""
    if err.is_terminal:
        with doing("starting") as update:
            yield update
        return
    started_s = time.monotonic()

    def told(what: str) -> None:
        err.print(f"{time.monotonic() - started_s:6.0f} s  {what}", markup=False, highlight=False)

    yield told


@app.command()
def simulate(
    model: Annotated[str, typer.Argument(help="The model to measure with.")] = "smollm2-135m",
    quick: QuickFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Real swarms of 3 and 6 processes on this machine beside what the simulator predicts for them.

    Example: bsns bench simulate --quick
    """

    async def verb() -> None:
        from bsns.bench.simulation import bench_simulation

        with doing("starting", quiet=as_json) as update:
            figures = await bench_simulation(model, quick=quick, told=update)
        if as_json:
            emit(figures)
            return
        view = Table("nodes", "streams", "measured tokens/s", "predicted", "error")
        for row in figures["rows"]:
            cells = (row["nodes"], row["streams"], row["measured"], row["predicted"])
            view.add_row(*map(str, cells), f"{row['error']:+.1%}")
        out.print(view)
        out.print(_table(figures))

    run(verb(), as_json=as_json)


def _swarm_table(figures: dict[str, Any]) -> Table:
    view = Table("setting", "tokens/s of", "equal split", "planned", "gain predicted", "measured")
    for row in figures["settings"]:
        for objective, streams in (("latency", 1), ("throughput", figures["streams"])):
            compared = row[objective]
            speeds = (compared[name] for name in ("equal", "planned"))
            view.add_row(
                str(row["number"]),
                f"{streams} stream{'s' if streams > 1 else ''}",
                *(f"{speed['measured']} ({speed['predicted']} predicted)" for speed in speeds),
                f"{compared['predicted_gain']:+.0%}",
                f"{compared['measured_gain']:+.0%}",
            )
    return view


def _table(figures: dict[str, Any]) -> Table:
    view = Table("figure", "value")
    for key, value in _flat(figures):
        view.add_row(key, str(value))
    return view


def _flat(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested figures as `outer.inner`; rows of single instances are for `--json`."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        elif key != "rows":
            yield before + key, value
