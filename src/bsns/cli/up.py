"""`bsns up`: a swarm on this machine."""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from bsns.cli import sampling_options as sampling
from bsns.cli.console import DtypeOption, JsonFlag, doing, emit, err, out, run

if TYPE_CHECKING:
    from bsns.client.generate import Stats
    from bsns.node.client import Client
    from bsns.node.view import NodeStatus


def up(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a directory, a .gguf file or a Hugging Face id.")],
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=64, help="How many node processes.")] = 3,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this, then take the swarm down.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    dtype: DtypeOption = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Compute threads per node.")] = 1,
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

    Without --prompt or --chat it stays up until Ctrl-C and prints the invite for other terminals. It never outlives the
    process that started it.

    Example: bsns up smollm2-135m --nodes 3 --prompt "What is the capital of France?"
    """

    async def verb() -> None:
        from bsns.client.sampling import SamplingOptions
        from bsns.model.source import resolve
        from bsns.node.client import Client
        from bsns.node.leash import watch_parent
        from bsns.node.local import LocalSwarm
        from bsns.planning.joining import equal_split

        options = SamplingOptions(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), max_tokens
        )
        watching = asyncio.create_task(watch_parent(asyncio.current_task()))
        with doing("looking at the model", quiet=as_json) as update:
            source = await asyncio.to_thread(resolve, model, progress=lambda what, _: update(what))
            ranges = equal_split(source.block_count, nodes)
            state = ["starting"] * nodes

            def told(number: int, what: str) -> None:
                state[number] = what
                update(" · ".join(f"node {i + 1}: {s}" for i, s in enumerate(state)))

            update(f"starting {nodes} nodes")
            swarm = LocalSwarm(model, ranges, dtype=dtype, device=device, threads=threads, told=told)
            await swarm.__aenter__()
        try:
            async with Client.on(swarm.peer, source, dtype=dtype) as client:
                if not as_json:
                    err.print(f"[green]{nodes} nodes serve {source.name}[/]")
                if chat:
                    from bsns.cli.chat import converse

                    await converse(client, options)
                elif prompt is not None:
                    await answer(client, prompt, options, raw=raw, as_json=as_json)
                else:
                    if as_json:
                        emit({"event": "serving", "invite": swarm.peer.invite})
                    else:
                        out.print("Use it from another terminal (Ctrl-C ends the swarm):")
                        out.print(f"  bsns chat {model} --join {swarm.peer.invite}", highlight=False, markup=False)
                    await asyncio.Event().wait()
        finally:
            watching.cancel()
            with doing("taking the swarm down", quiet=as_json):
                await swarm.close()

    run(verb(), as_json=as_json)


async def answer(client: Client, prompt: str, options: Any, *, raw: bool, as_json: bool) -> None:
    """Stream one answer and report what it cost."""
    from bsns.client.generate import Stats

    stats = Stats()
    text = ""
    async for piece in client.stream(prompt, options, raw=raw, stats=stats):
        text += piece.text
        if not as_json:
            out.print(piece.text, end="", markup=False, highlight=False)
    nodes = await client.status()
    if as_json:
        emit(report(text, stats, nodes))
        return
    out.print()
    err.print()
    err.print(table(stats, nodes))
    err.print(
        f"{stats.tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, first after {stats.ttft_ms:.0f} ms; "
        f"our own time per hop {_median(stats.own_ms_per_hop()):.2f} ms",
        highlight=False,
    )


def report(text: str, stats: Stats, nodes: list[NodeStatus]) -> dict[str, Any]:
    """The answer as one JSON object."""
    return {
        "text": text,
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
    for node in nodes:
        compute, inside = times.get(node.record.peer, (0.0, 0.0))
        rss = node.now.rss_bytes if node.now else node.record.rss_bytes
        view.add_row(
            f"…{node.record.peer[-8:]}",
            str(node.record.blocks),
            node.record.device,
            f"{rss / 1e6:.0f} MB",
            f"{compute:.2f} ms",
            f"{inside:.2f} ms",
        )
    return view


def _hops(stats: Stats) -> list[tuple[str, str, float, float]]:
    """For each stage its median compute time and time inside the node, over the decoding steps."""
    steps = [hops for _, hops in stats.turns_ms[1:] if len(hops) == len(stats.route)]
    return [
        (hop.peer, str(hop.blocks), _median([s[i][1] for s in steps]), _median([s[i][0] for s in steps]))
        for i, hop in enumerate(stats.route)
    ]


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
