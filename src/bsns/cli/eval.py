"""`bsns eval`: how good a model is when a swarm computes it, and two such runs side by side."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from bsns.cli import local_swarm
from bsns.cli.console import (
    Dtype,
    DtypeOption,
    ExecutorOption,
    JsonFlag,
    ModelArgument,
    QuantOption,
    ThreadsOption,
    doing,
    emit,
    out,
    run,
    say_aside,
    see_through,
)
from bsns.cli.files import read_file, write_file
from bsns.cli.routing_options import Wire
from bsns.core.errors import BadOption, MissingBlocks
from bsns.core.words import several
from bsns.node.processes import prepare

if TYPE_CHECKING:
    from bsns.evaluation.comparison import Compared, Comparison
    from bsns.evaluation.journal import Journal
    from bsns.evaluation.results import Metric, Results, Settings, TaskResult
    from bsns.evaluation.tasks.task import Item
    from bsns.model.source import ModelSource
    from bsns.node.client import Client

LOCAL = "local"
DEADLINE_S = 120.0
"""What a chunk may take: with many texts at once on slow machines it waits for those before it."""


class _Verbs(typer.core.TyperGroup):
    """`bsns eval MODEL` is `bsns eval run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


HELP = """How good a model is when a swarm computes it.

Example:
  bsns eval smollm2-135m --tasks hellaswag,lambada --limit 100 --output none.json"""
RUN_HELP = (
    "Ask a model the questions of some tasks, over a swarm.\n\n"
    "Tasks: hellaswag, lambada, causal_judgement, disambiguation_qa, logical_deduction_three, logical_deduction_five, "
    "logical_deduction_seven, perplexity; and, where it is installed, those of lm-evaluation-harness. A run that was "
    "interrupted goes on where it was if it is given the same --output.\n\n"
    "Example: bsns eval smollm2-135m --tasks hellaswag,lambada --limit 100 --output none.json"
)
app = typer.Typer(cls=_Verbs, no_args_is_help=True, help=HELP)


@app.callback()
def _eval() -> None:
    pass


@app.command("run", help=RUN_HELP)
def evaluate(
    model: ModelArgument,
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAMES", help="Which tasks, with commas between them.")],
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="The first N questions of each task. Default: all."),
    ] = None,
    swarm: Annotated[
        str,
        typer.Option("--swarm", metavar="INVITE", help="A swarm that is there, or local: one is started here."),
    ] = LOCAL,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, metavar="N", help="How many, if it is local.")] = 3,
    quant: QuantOption = "none",
    wire: Wire = "auto",
    dtype: DtypeOption = "auto",
    executor: ExecutorOption = "auto",
    threads: ThreadsOption = 1,
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, max=64, metavar="N", help="How many questions at once.")
    ] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Keep every answer here, for compare.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """As RUN_HELP says."""

    async def verb() -> None:
        names = _names(tasks)
        if swarm != LOCAL and (quant != "none" or executor != "auto"):
            raise BadOption("--quant and --executor are for a local swarm; those who serve one choose their own")
        async with contextlib.AsyncExitStack() as stack:
            with doing("loading libraries", quiet=as_json) as say:
                if swarm == LOCAL:
                    prepare()
                from bsns.evaluation.registry import TASKS
                from bsns.model.source import resolve

                foreign = [name for name in names if name not in TASKS]
                if foreign:
                    _check_harness(foreign, list(TASKS))
                say("looking at the model")
                source = await asyncio.to_thread(resolve, model, progress=say)
                say("reading the questions")
                items = await asyncio.to_thread(_items, source, [name for name in names if name in TASKS], limit)
                local = None
                if swarm == LOCAL:
                    local = await local_swarm.start(
                        source, model, nodes, say, dtype=dtype, executor=executor, quant=quant, threads=threads
                    )
                    stack.push_async_callback(local_swarm.take_down, local, quiet=as_json)
                say("joining the swarm")
                client = await _join(local.peer.invite if local else swarm, model, dtype, threads, wire)
                stack.push_async_callback(see_through, client.close())
                settings, members = await _settings(client, quant if local else "the nodes'", wire)
            work = _evaluate(
                client, settings, members, names, items, limit, sessions=sessions, output=output, quiet=as_json
            )
            results = await (local_swarm.mended(work, local) if local else work)
        if as_json:
            emit(results.summary())
        else:
            out.print(_table(results))

    run(verb(), as_json=as_json)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A.json", help="What one run kept with --output.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="What another kept.")],
    as_json: JsonFlag = False,
) -> None:
    """Two runs side by side, question by question: what the second changes against the first.

    Example: bsns eval compare none.json int8.json
    """

    async def verb() -> None:
        with doing("comparing", quiet=as_json):
            import msgspec

            from bsns.evaluation.comparison import compare
            from bsns.evaluation.results import Results

            found = compare(*(Results.from_json(read_file(file), str(file)) for file in (a, b)))
        if as_json:
            emit(msgspec.to_builtins(found))
        else:
            out.print(_compared_table(found, a.name, b.name))

    run(verb(), as_json=as_json)


def _names(tasks: str) -> list[str]:
    names = list(dict.fromkeys(name for name in (part.strip() for part in tasks.split(",")) if name))
    if not names:
        raise BadOption("no task is named; for example --tasks hellaswag,lambada")
    return names


def _check_harness(names: Sequence[str], own: Sequence[str]) -> None:
    """Raises BadOption unless lm-evaluation-harness is here and knows the tasks."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars and ours would write over each other
    try:
        from bsns.evaluation.harness import check_names
    except ModuleNotFoundError as error:
        raise BadOption(
            f"there is no task {names[0]!r} among {', '.join(own)}; lm-evaluation-harness has many more, but "
            f"{error.name} is missing: pip install 'bsns[eval]'"
        ) from None
    check_names(names)


def _items(source: ModelSource, names: Sequence[str], limit: int | None) -> dict[str, Sequence[Item]]:
    """The questions of our own tasks. Raises BadOption where a package with data is missing."""
    from bsns.client.prompts import Prompts
    from bsns.evaluation.registry import TASKS

    encode = Prompts(source.path).encode
    return {name: TASKS[name].items(limit, encode) for name in names}


async def _join(invite: str, model: str, dtype: Dtype, threads: int, wire: str) -> Client:
    from bsns.node.client import Client

    client = Client(
        invite, model, dtype=dtype, threads=threads, wire=wire, objective="throughput", deadline_s=DEADLINE_S
    )
    return await client.__aenter__()


async def _settings(client: Client, quant: str, wire: str) -> tuple[Settings, int]:
    """What the answers depend on, as the nodes say it; and how many nodes there are."""
    from bsns.evaluation.results import Settings

    records = [record for record in await client.view.records() if record.state == "serving"]
    if not records:
        raise MissingBlocks(f"nobody serves {client.source.name} any more; try again")
    executors = sorted({record.executor.split(":")[0] for record in records})
    return Settings(
        model=client.source.name,
        model_id=client.source.model_id,
        dtype=records[0].dtype,
        executor="+".join(executors),
        quant=quant,
        wire=wire,
    ), len(records)


async def _evaluate(
    client: Client,
    settings: Settings,
    nodes: int,
    names: Sequence[str],
    items: dict[str, Sequence[Item]],
    limit: int | None,
    *,
    sessions: int,
    output: Path | None,
    quiet: bool,
) -> Results:
    """Run every task and write the results down. However it ends, a person is told how to go on."""
    import bsns
    from bsns.evaluation.journal import Journal
    from bsns.evaluation.results import Results

    found: dict[str, TaskResult] = {}
    with Journal(output, settings.digest()) as journal:
        whole = False
        try:
            for name in names:
                found |= await _task(client, name, items.get(name), limit, journal, sessions, quiet)
            results = Results(bsns.__version__, settings, nodes, found)
            if output is not None:
                write_file(output, results.to_json())
                journal.finish()
            whole = True
        finally:
            if not whole and len(journal):
                _say_how_to_go_on(journal)
    return results


async def _task(
    client: Client,
    name: str,
    items: Sequence[Item] | None,
    limit: int | None,
    journal: Journal,
    sessions: int,
    quiet: bool,
) -> dict[str, TaskResult]:
    """The results of a task of ours, or of the harness's where there are no items."""
    from bsns.evaluation.registry import TASKS
    from bsns.evaluation.runner import run_task
    from bsns.evaluation.scoring import SwarmScorer

    tokenizer = client.generator.prompts.tokenizer
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    scorer = SwarmScorer(client.generator, client.generator.prompts.encode, prefix=prefix)
    with doing(name, quiet=quiet) as say:

        def told(done: int, all: int) -> None:
            say(f"{name} · {done:,} of {all:,}", done / max(all, 1))

        if items is not None:
            return {name: await run_task(name, TASKS[name], items, scorer, journal, at_once=sessions, told=told)}
        from bsns.evaluation.harness import SwarmLM, run_harness

        lm = SwarmLM(client.generator, scorer, journal, prefix=prefix, at_once=sessions, told=told)
        return await run_harness(name, lm, limit)


def _say_how_to_go_on(journal: Journal) -> None:
    done = several(len(journal), "answer")
    if journal.file is None:
        say_aside(f"{done} lost; with --output FILE.json they would be kept, and a run could go on where it was")
    else:
        say_aside(f"{done} kept in {journal.file}; the same command goes on from there")


def _table(results: Results) -> Table:
    """`scored` and `read` count tokens."""
    settings = results.settings
    how = f"{settings.dtype}, {settings.executor}, weights {settings.quant}, wire {settings.wire}"
    table = Table(
        *(Column("task", overflow="fold"), "n", "metric", "value", "±", "time", "scored", "read"),
        title=f"{settings.model} on {several(results.nodes, 'node')}: {how}",
    )
    for name, task in results.tasks.items():
        for number, (metric, figure) in enumerate(task.metrics.items()):
            first = (name, f"{task.n:,}") if number == 0 else ("", "")
            last = (f"{task.seconds:,.1f} s", f"{task.tokens:,}", f"{task.read_tokens:,}") if number == 0 else ("",) * 3
            table.add_row(*first, metric, *_said(figure), *last)
    return table


def _said(figure: Metric) -> tuple[str, str]:
    """Accuracies in percent."""
    scale, unit = (100.0, " %") if figure.kind == "accuracy" else (1.0, "")
    error = "–" if figure.stderr is None else f"{figure.stderr * scale:.2f}{unit}"
    return f"{figure.value * scale:.2f}{unit}", error


def _compared_table(found: Comparison, a: str, b: str) -> Table:
    """Differences of accuracies in points of percent."""
    table = Table(
        *(Column("task", overflow="fold"), "n", "metric", "A", "B", "change", "±", "both · A · B · none", "same", "p"),
        title=f"A: {a} ({_how(found.a)})\nB: {b} ({_how(found.b)})",
    )
    for name, task in found.tasks.items():
        for number, (metric, compared) in enumerate(task.metrics.items()):
            first = (name, f"{task.n:,}") if number == 0 else ("", "")
            table.add_row(*first, metric, *_compared(compared))
    return table


def _how(settings: Settings) -> str:
    return f"{settings.model}, {settings.dtype}, weights {settings.quant}, wire {settings.wire}"


def _compared(compared: Compared) -> tuple[str, ...]:
    from bsns.evaluation.comparison import Accuracies, Means, Perplexities

    def error(scale: float, digits: int) -> str:
        return "–" if compared.stderr is None else f"{compared.stderr * scale:.{digits}f}"

    match compared:
        case Accuracies(a=a, b=b):
            split = f"{compared.both:,} · {compared.only_a:,} · {compared.only_b:,} · {compared.neither:,}"
            same = "–" if compared.agreement is None else f"{compared.agreement * 100:.1f} %"
            change = f"{compared.difference * 100:+.2f}"
            return f"{a:.2%}", f"{b:.2%}", change, error(100, 2), split, same, f"{compared.p:.3g}"
        case Perplexities(a=a, b=b):
            return f"{a:.4f}", f"{b:.4f}", f"× {compared.ratio:.4f}", error(1, 4), "", "", ""
        case Means(a=a, b=b):
            return f"{a:.4f}", f"{b:.4f}", f"{compared.difference:+.4f}", error(1, 4), "", "", ""
