"""`bsns simulate`: a swarm of any size on a virtual clock."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.table import Table

from bsns.cli.console import EXIT_FAILED, JsonFlag, doing, emit, out, run
from bsns.cli.files import read_file, write_file
from bsns.core.errors import BadOption


def simulate(
    scenario: Annotated[Path, typer.Argument(help="The scenario, a TOML file: see docs/simulator.md.")],
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="In place of the scenario's.")] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="So many seeds, one after the other.")] = 1,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes, for several runs.")] = 1,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the run into this SVG file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a swarm: the software's own decisions, on machines, links and a clock that are only reckoned.

    The same scenario and seed give the same report, byte by byte. The exit status is 1 if anything happened that must
    not: wrong tokens, an answer that hangs or only looks complete, sessions left over, a block that a plan uncovered.

    Example:
      bsns simulate benchmarks/scenarios/faults-50.toml --plot run.svg
    """

    figures: list[dict[str, Any]] = []

    async def verb() -> None:
        if plot is not None and runs > 1:
            raise BadOption("a picture shows one run; leave out --runs")
        from bsns.simulator.scenario import parse_scenario

        text = read_file(scenario).decode(errors="replace")
        first = parse_scenario(text)
        began = first.seed if seed is None else seed
        with doing("simulating", quiet=as_json) as say:
            loop = asyncio.get_running_loop()
            pool = ProcessPoolExecutor(
                min(jobs, runs), get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
            )
            try:
                running = [loop.run_in_executor(pool, _one, text, began + n, plot is not None) for n in range(runs)]
                for run_ in running:
                    run_.add_done_callback(_taken_note_of)
                for run_ in running:
                    done, drawn = await run_
                    figures.append(done)
                    say(f"{len(figures)} of {runs} simulated")
            except BaseException:  # whoever ends this does not want to wait for what runs
                for child in active_children():
                    child.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
            if plot is not None:
                write_file(plot, drawn)
        if as_json:
            emit(figures[0] if runs == 1 else {"runs": figures})
        else:
            for one in figures if runs == 1 else [one for one in figures if one["problems"]]:
                out.print(_table(one))
            if runs > 1:
                out.print(_sum(figures))

    run(verb(), as_json=as_json)
    if any(one["problems"] for one in figures):
        raise typer.Exit(EXIT_FAILED)


def _taken_note_of(run_: asyncio.Future[Any]) -> None:
    """Whoever waits for the runs hears of the first that fails; asyncio would tell of all the others in the log."""
    if not run_.cancelled():
        run_.exception()


def _begin(parent: int) -> None:
    """In each process of the pool: it ends with whoever waits for it, killed or not, and by no other hand."""
    from bsns.node.leash import die_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches this one, too
    die_with_parent(parent)


def _one(text: str, seed: int, draw: bool) -> tuple[dict[str, Any], bytes]:
    """One run's figures, and its picture if that is wanted. In a process of its own, whose loops and logs are others:
    what simulated nodes complain of is no news."""
    from bsns.simulator.report import picture, report
    from bsns.simulator.scenario import parse_scenario
    from bsns.simulator.world import simulate

    if not os.environ.get("BSNS_LOG"):
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    outcome = simulate(parse_scenario(text, seed=seed))
    return report(outcome), picture(outcome) if draw else b""


def _table(figures: dict[str, Any]) -> Table:
    table = Table(title=f"{figures['name']}, seed {figures['seed']}", show_header=False, box=None)
    for name, value in figures.items():
        if name in ("name", "seed", "share_of_best"):
            continue
        if name == "problems":
            for problem in value or ["none"]:
                table.add_row(name, f"[red]{problem}" if value else problem)
        elif isinstance(value, dict):
            parts = [f"{key} {_said(part)}" for key, part in value.items()]
            table.add_row(name.replace("_", " "), "  ".join(parts) or "none")
        else:
            table.add_row(name.replace("_", " "), _said(value))
    return table


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {part}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _sum(figures: list[dict[str, Any]]) -> str:
    bad = [one["seed"] for one in figures if one["problems"]]
    answers = sum(one["answers"] for one in figures)
    whole = sum(one["whole"] for one in figures)
    struck = sum(kind["struck"] for one in figures for kind in one["faults"].values())
    repairs = sum(one["repairs"] for one in figures)
    said = f"{len(figures)} runs: {answers:,} answers, {whole:,} whole; {struck:,} faults struck, {repairs:,} repairs"
    return f"{said}; problems with seeds {', '.join(map(str, bad))}" if bad else f"{said}; no problems"
