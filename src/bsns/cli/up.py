"""`bsns up`: a swarm on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bsns import cli
from bsns.cli import local_swarm
from bsns.cli import routing_options as routing
from bsns.cli import sampling_options as sampling
from bsns.cli.console import (
    EXIT_INTERRUPTED,
    MOST_THREADS,
    DtypeOption,
    ExecutorOption,
    JsonFlag,
    KvOption,
    ModelArgument,
    QuantOption,
    doing,
    emit,
    err,
    out,
    run,
    say_aside,
)
from bsns.cli.gateway import open_listener, serve_http
from bsns.core.errors import BadOption
from bsns.core.ids import short_names
from bsns.core.words import several, size
from bsns.node.leash import ended_with_parent, watch_parent
from bsns.node.processes import prepare

if TYPE_CHECKING:
    from bsns.client.pieces import Stats
    from bsns.client.sampling import SamplingOptions
    from bsns.model.source import ModelSource
    from bsns.node.client import Client
    from bsns.node.view import NodeStatus


def up(
    model: ModelArgument,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, metavar="N", help="How many node processes.")] = 3,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this, then take the swarm down.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model.")] = False,
    gateway: Annotated[
        bool, typer.Option("--gateway", help="Serve it with OpenAI's HTTP API, on this machine only.")
    ] = False,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            "--gateway-port", min=0, max=65535, metavar="N", help="Its port; default: 8080; 0 takes a free one."
        ),
    ] = None,
    raw: sampling.RawFlag = False,
    dtype: DtypeOption = "auto",
    executor: ExecutorOption = "auto",
    quant: QuantOption = "none",
    kv: KvOption = "none",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            max=MOST_THREADS,
            metavar="N",
            help="Compute threads per node; default: every core where nodes compute natively, otherwise one.",
        ),
    ] = None,
    warm_spares: routing.WarmSpares = False,
    wire: routing.Wire = "auto",
    speculate: routing.Speculate = True,
    draft: routing.Draft = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Let Prometheus read each node's metrics, on free ports of this machine.")
    ] = False,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.Penalty = 1.0,
    seed: sampling.Seed = 0,
    stop: sampling.Stop = None,
    max_tokens: sampling.MaxTokens = 256,
    as_json: JsonFlag = False,
) -> None:
    """Start a swarm of node processes on this machine, and use it.

    Without --prompt or --chat it stays up until Ctrl-C and prints the invite for other terminals. A node whose process
    ends is started again. It never outlives the process that started it, unless it is started with nohup.

    Example:
      bsns up smollm2-135m --nodes 3 --prompt "What is the capital of France?"
    """

    async def verb() -> None:
        if chat and (as_json or prompt is not None):
            raise BadOption("--chat is for people; give it without --json and --prompt")
        if gateway and (chat or prompt is not None):
            raise BadOption("--gateway stays up for clients; give it without --chat and --prompt")
        if gateway_port is not None and not gateway:
            raise BadOption("--gateway-port is the port of --gateway; give both, or neither")
        if prompt is not None:
            check_prompt(prompt)
        async with contextlib.AsyncExitStack() as stack:
            port = 8080 if gateway_port is None else gateway_port
            listener = open_listener("127.0.0.1", port, option="--gateway-port") if gateway else None
            leashed = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
            with doing("loading libraries", quiet=as_json) as say:
                with ended_with_parent(cli.parent, EXIT_INTERRUPTED) if leashed else contextlib.nullcontext():
                    prepare()
                    from bsns.client.sampling import SamplingOptions
                    from bsns.model.source import resolve
                    from bsns.node.client import Client

                options = SamplingOptions(
                    temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), max_tokens
                )
                if leashed:
                    watching = asyncio.create_task(watch_parent(asyncio.current_task(), cli.parent))
                    stack.callback(watching.cancel)
                say("looking at the model")
                source = await asyncio.to_thread(resolve, model, progress=say)
                swarm = await local_swarm.start(
                    source,
                    model,
                    nodes,
                    say,
                    dtype=dtype,
                    device=device,
                    threads=threads or _threads(source, device, executor, quant),
                    executor=executor,
                    quant=quant,
                    kv=kv,
                    movable=True,
                    metrics=metrics,
                )
                stack.push_async_callback(local_swarm.take_down, swarm, quiet=as_json)
                say("opening the model's ends")
                client = Client.on(
                    swarm.peer,
                    source,
                    dtype=dtype,
                    warm_spares=warm_spares,
                    wire=wire,
                    speculate=speculate,
                    draft=draft,
                )
                await stack.enter_async_context(client)
                say("measuring")
                forecast = await _forecast(client)
            if not as_json:
                many, serve = several(nodes, "node"), "serves" if nodes == 1 else "serve"
                err.print(f"[green]{many} {serve} {source.name}[/]", highlight=False)
                if forecast.alone > forecast.together:
                    err.print(
                        f"one node alone would answer a single stream faster: predicted {forecast.alone:.1f} tokens/s, "
                        f"against {forecast.together:.1f} with {many}; cut models that do not fit one",
                        style="yellow",
                        highlight=False,
                    )
            if chat:
                from bsns.cli.chat import converse

                await local_swarm.mended(converse(client, options), swarm)
            elif prompt is not None:
                answering = answer(client, prompt, options, raw=raw, as_json=as_json, forecast=forecast)
                await local_swarm.mended(answering, swarm)
            else:
                if as_json:
                    serving = {"event": "serving", "invite": swarm.peer.invite, "metrics": swarm.metrics()}
                    emit(serving | forecast.as_dict())
                else:
                    for url in swarm.metrics():
                        out.print(f"Metrics: {url}", highlight=False, markup=False)
                    out.print("Use it from another terminal (Ctrl-C ends the swarm):")
                    out.print(
                        f"  bsns chat {shlex.quote(model)} --join {swarm.peer.invite}", highlight=False, markup=False
                    )
                told = _say_event if as_json else say_aside
                if listener is not None:
                    await local_swarm.mended(serve_http(client, listener, as_json=as_json), swarm, told)
                else:
                    raise await swarm.mend(told)

    run(verb(), as_json=as_json)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted tokens per second of one stream: over the nodes there are, and over one that held all the blocks."""

    together: float
    alone: float

    def as_dict(self) -> dict[str, Any]:
        return {"predicted_tokens_per_s": round(self.together, 2), "one_node_tokens_per_s": round(self.alone, 2)}


async def _forecast(client: Client) -> Forecast:
    """Predict from a few tokens: what the nodes measured when they started, they measured beside each other."""
    from bsns.node.trial import try_out

    trial = await try_out(client, tokens=8)
    return Forecast(1 / (trial.client_s + trial.turn_s), trial.alone_tokens_per_s())


def _threads(source: ModelSource, device: str, executor: str, quant: str) -> int:
    """Of each node. Raises BadOption.

    Native threads sleep while they wait, so that every stage may use all cores in its turn: 1.7 times as fast for one
    stream as a core each, and no slower for 32. Torch's wait spinning.
    """
    from bsns.core.blocks import BlockRange
    from bsns.node.capacity import choose_device, default_threads
    from bsns.node.executors import NATIVE, choose_executor

    whole = BlockRange(0, source.block_count)
    choice = choose_executor(source, whole, device=choose_device(device), quant=quant, prefer=executor)
    return default_threads() if choice.name == NATIVE else 1


def _say_event(line: str) -> None:
    emit({"event": "node", "message": line})


def check_prompt(text: str) -> None:
    """Raises BadOption for a prompt without a word in it."""
    if not text.strip():
        raise BadOption('the prompt is empty; say something, for example --prompt "Name three rivers."')


async def answer(
    client: Client,
    prompt: str,
    options: SamplingOptions,
    *,
    raw: bool,
    as_json: bool,
    forecast: Forecast | None = None,
) -> None:
    """Stream one answer and report what it cost."""
    from bsns.client.pieces import Stats

    stats = Stats()
    text, finished = "", None
    try:
        async with contextlib.aclosing(client.stream(prompt, options, raw=raw, stats=stats)) as pieces:
            async for piece in pieces:
                text, finished = text + piece.text, piece.finished
                if not as_json:
                    out.print(piece.text, end="", markup=False, highlight=False)
    finally:
        if text and not as_json:
            out.print()
    nodes = in_block_order(await client.status())
    if as_json:
        emit(report(text, finished, stats, nodes) | (forecast.as_dict() if forecast else {}))
        return
    err.print()
    err.print(table(stats, nodes))
    made = several(stats.tokens, "token")
    cut = f" (cut off at {stats.tokens}; see --max-tokens)" if finished == "length" else ""
    err.print(
        f"{made}{cut}, {stats.tokens_per_s:.1f} tokens/s, first after {stats.ttft_ms:.0f} ms; "
        f"our own time per hop {_median(stats.own_ms_per_hop()):.2f} ms",
        highlight=False,
    )


def in_block_order(nodes: list[NodeStatus]) -> list[NodeStatus]:
    """Nodes as a token meets them."""
    return sorted(
        nodes, key=lambda node: (node.record.model_name, node.record.start, node.record.end, node.record.peer)
    )


def report(text: str, finished: str | None, stats: Stats, nodes: list[NodeStatus]) -> dict[str, Any]:
    """The answer as one JSON object."""
    return {
        "text": text,
        "finished": finished,
        "tokens": stats.tokens,
        "prompt_tokens": stats.prompt_tokens,
        "tokens_per_s": round(stats.tokens_per_s, 2),
        "ttft_ms": round(stats.ttft_ms, 1),
        "nodes": [
            {
                "id": node.record.peer,
                "range": str(node.record.blocks),
                "device": node.record.device,
                "rss_mb": round((node.now.rss_bytes if node.now else node.record.rss_bytes) / 1e6, 1),
            }
            for node in nodes
        ],
        "hops_ms": [
            {"node": peer, "range": blocks, "compute": round(compute, 3), "inside": round(inside, 3)}
            for peer, blocks, compute, inside in _hops(stats)
        ],
        "hop_own_ms": round(_median(stats.own_ms_per_hop()), 3),
    }


def table(stats: Stats, nodes: list[NodeStatus]) -> Table:
    """Who held which blocks, and where a token's time went."""
    view = Table("node", "blocks", "device", "memory", "compute / token", "inside the node")
    times = {peer: (compute, inside) for peer, _, compute, inside in _hops(stats)}
    names = short_names(node.record.peer for node in nodes)
    for node in nodes:
        rss = node.now.rss_bytes if node.now else node.record.rss_bytes
        view.add_row(
            names[node.record.peer],
            str(node.record.blocks),
            Text(node.record.device),
            size(rss),
            *(f"{time_ms:.2f} ms" if time_ms else "–" for time_ms in times.get(node.record.peer, (0.0, 0.0))),
        )
    return view


def _hops(stats: Stats) -> list[tuple[str, str, float, float]]:
    """For each stage its median compute time and time inside the node, over the decoding steps."""
    steps = [hops for _, hops in stats.turns_ms[1:] if len(hops) == len(stats.route)]
    return [
        (
            hop.peer,
            str(hop.blocks),
            _median([step[i].computing_ms for step in steps]),
            _median([step[i].inside_ms for step in steps]),
        )
        for i, hop in enumerate(stats.route)
    ]


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
