"""`bsns serve`: one node."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from bsns.cli.console import (
    DAY_S,
    MOST_THREADS,
    DtypeOption,
    ExecutorOption,
    JsonFlag,
    KvOption,
    ModelArgument,
    QuantOption,
    a_number,
    doing,
    emit,
    err,
    out,
    parse_size,
    run,
    see_through,
    settle,
)
from bsns.cli.logs import LogFormatOption
from bsns.cli.telemetry import OtlpOption, open_telemetry
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.plan import Objective
from bsns.core.words import size
from bsns.swarm.election import LEASE_S
from bsns.swarm.records import MAX_BYTES

if TYPE_CHECKING:
    from bsns.node.server import Server


def serve(
    model: ModelArgument,
    blocks: Annotated[
        str,
        typer.Option(
            "--blocks",
            metavar="START:END|auto",
            help="Pins the node to a range; auto takes what the swarm needs most, and moves as the orchestrator plans.",
        ),
    ] = "auto",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="The most memory to use, for example 2GiB.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", min=16, metavar="N", help="KV cache, in tokens.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            "--join", envvar="BSNS_INVITE", metavar="INVITE", help="An invite. Without one the node founds a new swarm."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Found a swarm that anybody may use without an invite's secret.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    dtype: DtypeOption = "auto",
    executor: ExecutorOption = "auto",
    quant: QuantOption = "none",
    kv: KvOption = "none",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=MOST_THREADS, metavar="N", help="Compute threads; default: every core."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")
    ] = 0,
    objective: Annotated[
        str,
        typer.Option(
            "--objective", metavar="NAME", help="What to plan for when elected: throughput, latency or mixed."
        ),
    ] = "throughput",
    orchestrate: Annotated[
        bool, typer.Option("--orchestrate/--no-orchestrate", help="Stand for election as orchestrator, or only follow.")
    ] = True,
    first_blocks: Annotated[str | None, typer.Option("--first-blocks", metavar="START:END", hidden=True)] = None,
    most_blocks: Annotated[int | None, typer.Option("--most-blocks", metavar="N", min=1, hidden=True)] = None,
    lease_s: Annotated[
        float,
        typer.Option("--lease-s", min=0.1, max=DAY_S, callback=a_number, metavar="SECONDS", hidden=True),
    ] = LEASE_S,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", metavar="HOST:PORT", help="Let Prometheus read metrics here; port 0 takes a free one."
        ),
    ] = None,
    otlp: OtlpOption = None,
    log_format: LogFormatOption = "text",
    as_json: JsonFlag = False,
    leashed: Annotated[int | None, typer.Option("--leashed", hidden=True)] = None,
) -> None:
    """Serve a range of a model's blocks until Ctrl-C.

    Without --join it founds a new swarm and prints the invite with which others join. It listens on this machine only
    unless --host says otherwise.

    Example:
      bsns serve smollm2-135m --host 0.0.0.0 --memory 2GiB
      bsns serve smollm2-135m --blocks 0:15 --join bsns1-…
    """
    if leashed is not None:
        from bsns.node.leash import die_with_parent

        leashed = leashed or os.getppid()  # whoever was forked is leashed already, and knows nobody's id
        die_with_parent(leashed)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)

    async def verb() -> None:
        memory_bytes = parse_size(memory)
        if memory_bytes is not None and memory_bytes > MAX_BYTES:
            raise BadOption(f"--memory {memory} is more than a node can have; give at most {size(MAX_BYTES)}")
        if public and join:
            raise BadOption("--public founds a new swarm, --join enters one; give only one of them")
        Objective.named(objective)
        async with contextlib.AsyncExitStack() as stack:
            scraping = None
            if metrics is not None:
                from bsns.node.scraping import Scraping, parse_place

                scraping = Scraping(*parse_place(metrics))
                stack.push_async_callback(scraping.close)
            if (telemetry := open_telemetry("bsns-node", otlp)) is not None:
                stack.push_async_callback(telemetry.close)
            with doing("loading libraries", quiet=as_json) as say:
                from bsns.model.source import resolve
                from bsns.node.leash import watch_parent
                from bsns.node.peer import Listen, Peer
                from bsns.node.server import ServeOptions, Server

                if leashed is not None:
                    watching = asyncio.create_task(watch_parent(asyncio.current_task(), leashed))
                    stack.callback(watching.cancel)

                def told(what: str, done: float | None = None) -> None:
                    say(what, done)
                    if as_json:
                        emit({"event": "progress", "what": what, "done": done})

                told("looking at the model")
                source = await asyncio.to_thread(resolve, model, progress=told)
                for asked in (blocks, first_blocks):
                    if asked not in (None, "auto"):  # a mistake is told before the swarm is troubled
                        BlockRange.parse(asked, source.block_count)
                told("joining the swarm" if join else "founding a swarm")
                options = ServeOptions(
                    blocks,
                    memory_bytes,
                    cache_tokens,
                    device,
                    dtype,
                    threads,
                    Listen(host, port),
                    first_blocks=first_blocks,
                    orchestrate=orchestrate,
                    objective=objective,
                    lease_s=lease_s,
                    most_blocks=most_blocks,
                    executor=executor,
                    quant=quant,
                    kv=kv,
                )
                peer = await (
                    Peer.join(join, options.listen) if join else Peer.found(options.listen, open_swarm=public)
                )
                tracer = telemetry.stages(peer.id) if telemetry is not None else None
                try:
                    server = await Server.start(peer, source, options, told, tracer)
                except BaseException:
                    await see_through(peer.close())
                    raise
                stack.push_async_callback(_leave, server, quiet=as_json)
            if scraping is not None:
                from bsns.node.metrics import server_metrics

                scraping.begin(partial(server_metrics, server))
            record = server.record
            settle()
            if as_json:
                emit(
                    {
                        "event": "serving",
                        "id": record.peer,
                        "range": str(record.blocks),
                        "device": record.device,
                        "dtype": record.dtype,
                        "executor": record.executor,
                        "cache_tokens": record.cache_tokens,
                        "invite": peer.invite,
                        "metrics": scraping.url if scraping is not None else None,
                    }
                )
            else:
                err.print(
                    f"[green]serving blocks {record.blocks} of {source.name}[/] on {record.device} in {record.dtype}, "
                    f"computed by {escape(record.executor)}, "
                    f"cache for {record.cache_tokens} tokens; Ctrl-C ends it",
                    highlight=False,
                )
                if scraping is not None:
                    err.print(f"metrics at {scraping.url}", highlight=False, markup=False)
                if not join:
                    where = "" if host not in ("127.0.0.1", "localhost", "::1") else " on this machine (see --host)"
                    out.print(f"Others{where} join with:", highlight=False)
                    out.print(f"  bsns serve {shlex.quote(model)} --join {peer.invite}", highlight=False, markup=False)
                    out.print("and use it with:")
                    out.print(f"  bsns chat {shlex.quote(model)} --join {peer.invite}", highlight=False, markup=False)
            raise await peer.transport.lost()

    run(verb(), as_json=as_json, leashed=leashed is not None, log_format=log_format)


async def _leave(server: Server, *, quiet: bool) -> None:
    """Hand over the sessions that run, unless a second signal comes; then go."""
    sessions = len(server.worker.sessions)
    try:
        if sessions:
            if not quiet:
                text = f"leaving when {sessions} session{'s' * (sessions != 1)} went elsewhere; again to leave at once"
                err.print(text, highlight=False)
            await server.hand_over()
    finally:
        await see_through(server.close())
