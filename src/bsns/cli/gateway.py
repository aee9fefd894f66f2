"""`bsns gateway`: an OpenAI-compatible server in front of a swarm."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from bsns.cli import routing_options as routing
from bsns.cli.console import (
    DAY_S,
    DtypeOption,
    JoinOption,
    JsonFlag,
    ModelArgument,
    ThreadsOption,
    a_number,
    doing,
    emit,
    err,
    out,
    parse_size,
    run,
    see_through,
    settle,
    tell,
)
from bsns.cli.logs import LogFormat, LogFormatOption, log_to_stderr
from bsns.cli.telemetry import OtlpOption, open_telemetry
from bsns.core.errors import BadOption
from bsns.core.hosts import is_loopback

if TYPE_CHECKING:
    from bsns.gateway.server import Listener
    from bsns.node.client import Client

KeysOption = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FILE", help="Let in those who show a key of this file (see bsns gateway keys)."),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen on; 0 takes a free one.")
]
KeysFile = Annotated[Path, typer.Option("--keys", metavar="FILE", help="The key file.")]
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, for logs and for taking it away.")]


class _RunsByDefault(TyperGroup):
    """`bsns gateway MODEL …` is `bsns gateway run MODEL …`, so that `keys` can stand beside it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args.insert(0, "run")
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunsByDefault)
keys_app = typer.Typer(help="API keys: random words that clients show, kept as hashes in a file.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@app.command("run")
def gateway(
    model: ModelArgument,
    join: JoinOption,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: PortOption = 8080,
    keys: KeysOption = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody in whom --host lets in, without keys.")
    ] = False,
    most_body: Annotated[
        str, typer.Option("--max-body", metavar="SIZE", help="The largest request, for example 4MiB.")
    ] = "4MiB",
    drain_s: Annotated[
        float,
        typer.Option(
            "--drain-s",
            min=1,
            max=DAY_S,
            callback=a_number,
            metavar="SECONDS",
            help="How long streams have to end at the end.",
        ),
    ] = 30.0,
    stalled_s: Annotated[
        float,
        typer.Option(
            "--stalled-s",
            min=0.1,
            max=DAY_S,
            callback=a_number,
            metavar="SECONDS",
            help="Give up a client that reads nothing for so long.",
        ),
    ] = 30.0,
    deadline_s: Annotated[
        float,
        typer.Option(
            "--deadline-s",
            min=0.1,
            max=DAY_S,
            callback=a_number,
            metavar="SECONDS",
            help="How long an answer waits for the swarm.",
        ),
    ] = 20.0,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 1,
    objective: routing.Objective = "latency",
    weights: routing.Weights = None,
    warm_spares: routing.WarmSpares = False,
    wire: routing.Wire = "auto",
    draft: routing.Draft = None,
    otlp: OtlpOption = None,
    log_format: LogFormatOption = "text",
    as_json: JsonFlag = False,
) -> None:
    """Serve a swarm's model with OpenAI's HTTP API.

    It listens on this machine only unless --host says otherwise, and then it wants --keys. MODEL is the one the swarm
    serves: its tokenizer, embedding and head run in this process. Several gateways may serve one swarm.

    bsns gateway keys add NAME --keys FILE makes a key; list and remove are its neighbours.

    Example:
      bsns gateway smollm2-135m --join bsns1-… --port 8080
    """

    async def verb() -> None:
        listener = open_listener(host, port, keys=keys, public=public, most_body=most_body, stalled_s=stalled_s)
        telemetry = open_telemetry("bsns-gateway", otlp)
        with doing("loading libraries", quiet=as_json) as say:
            from bsns.node.client import Client

            client = Client(
                join,
                model,
                dtype=dtype,
                threads=threads,
                deadline_s=deadline_s,
                objective=objective,
                weights=weights,
                warm_spares=warm_spares,
                wire=wire,
                draft=draft,
                tracer=telemetry.answers(model) if telemetry is not None else None,
            )
            say("joining the swarm")
            await client.__aenter__()
        try:
            await serve_http(client, listener, drain_s=drain_s, as_json=as_json, log_format=log_format)
        finally:
            await see_through(client.close())
            if telemetry is not None:
                await telemetry.close()

    run(verb(), as_json=as_json, log_format=log_format)


def open_listener(
    host: str,
    port: int,
    *,
    keys: Path | None = None,
    public: bool = False,
    most_body: str = "4MiB",
    stalled_s: float = 30.0,
    option: str = "--port",
) -> Listener:
    """What can be wrong with a gateway's options is told before a swarm is troubled. Raises BadOption, PortInUse."""
    for name in ("fastapi", "uvicorn", "sse_starlette", "llguidance"):
        if importlib.util.find_spec(name) is None:
            raise BadOption(f"the gateway needs {name}, which is not installed: pip install 'bsns[gateway]'")
    from bsns.gateway.keys import KeyRing
    from bsns.gateway.server import Listener
    from bsns.gateway.settings import Settings

    if not host:
        raise BadOption("--host is empty; give an address of this machine, or 0.0.0.0 for all of them")
    if keys is None and not public and not is_loopback(host):
        raise BadOption(
            f"whoever reaches {host} could use the swarm; give --keys FILE "
            "(bsns gateway keys add NAME --keys FILE makes one), or --public to let everybody in"
        )
    ring = None if keys is None else KeyRing(keys)
    local_only = ring is None and is_loopback(host)
    return Listener(host, port, Settings(ring, parse_size(most_body) or 0, local_only, stalled_s), option)


async def serve_http(
    client: Client,
    listener: Listener,
    *,
    drain_s: float = 30.0,
    as_json: bool = False,
    log_format: LogFormat | None = None,
) -> None:
    """Answer until cancelled, with a log line for every request."""
    from bsns.gateway.app import create_app
    from bsns.gateway.engine import SwarmEngine
    from bsns.gateway.grammar import Grammars

    engine = SwarmEngine(client)
    with doing("reading the vocabulary", quiet=as_json):
        grammars = await asyncio.to_thread(Grammars, engine.prompts.tokenizer, engine.vocab_size)
    app = create_app(engine, grammars, listener.settings)
    settle()
    log_to_stderr(logging.INFO, "json" if as_json else log_format)
    listener.listen()
    if as_json:
        emit({"event": "listening", "url": listener.url, "model": engine.name})
    else:
        tell(f"{engine.name} answers at {listener.url}/v1; its dashboard is at {listener.url}/")
    await listener.serve(app, drain_s)


@keys_app.command("add")
def add(
    name: KeyName,
    keys: KeysFile,
    requests_per_minute: Annotated[
        int | None, typer.Option("--rpm", min=1, metavar="N", help="Requests a minute; default: any number.")
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option("--answers", min=1, metavar="N", help="Answers under way at once; default: any number."),
    ] = None,
) -> None:
    """Make a key and print it, once: the file keeps its hash."""

    async def verb() -> None:
        from bsns.gateway.keys import add_key
        from bsns.gateway.limits import Allowance

        word = add_key(keys, name, Allowance(requests_per_minute, answers))
        err.print("This is shown once; clients send it as their API key:")
        tell(word)

    run(verb())


@keys_app.command("list")
def list_(keys: KeysFile) -> None:
    """Whose keys there are, and what each may."""

    async def verb() -> None:
        from bsns.gateway.keys import read_keys

        table = Table("name", "made", "requests a minute", "answers at once")
        for key in read_keys(keys):
            made = time.strftime("%Y-%m-%d", time.localtime(key.created_s))
            table.add_row(key.name, made, str(key.requests_per_minute or "any"), str(key.answers or "any"))
        out.print(table)

    run(verb())


@keys_app.command("remove")
def remove(name: KeyName, keys: KeysFile) -> None:
    """Take a key away: gateways refuse it from the next request on."""

    async def verb() -> None:
        from bsns.gateway.keys import remove_key

        remove_key(keys, name)

    run(verb())
