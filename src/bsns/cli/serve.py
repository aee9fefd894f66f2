"""`bsns serve`: one node."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated

import typer

from bsns.cli.console import DtypeOption, JsonFlag, doing, emit, err, out, parse_size, run


def serve(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a directory, a .gguf file or a Hugging Face id.")],
    blocks: Annotated[str, typer.Option("--blocks", help="START:END, or auto for what the swarm needs most.")] = "auto",
    memory: Annotated[str | None, typer.Option("--memory", help="The most memory to use, for example 2GiB.")] = None,
    cache_tokens: Annotated[int | None, typer.Option("--cache-tokens", min=16, help="KV cache, in tokens.")] = None,
    join: Annotated[
        str | None,
        typer.Option("--join", envvar="BSNS_INVITE", help="An invite. Without one the node founds a new swarm."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Found a swarm that anybody may use without an invite's secret.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")] = "auto",
    dtype: DtypeOption = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Compute threads; default: every core.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 0,
    as_json: JsonFlag = False,
    leashed: Annotated[bool, typer.Option("--leashed", hidden=True)] = False,
) -> None:
    """Serve a range of a model's blocks until Ctrl-C.

    Prints the invite with which others join. Listens on this machine only unless --host says otherwise.

    Example: bsns serve smollm2-135m --host 0.0.0.0 --memory 2GiB
    """
    if leashed:
        from bsns.node.leash import die_with_parent

        die_with_parent()
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)

    async def verb() -> None:
        from bsns.core.errors import BadOption
        from bsns.model.source import resolve
        from bsns.node.leash import watch_parent
        from bsns.node.peer import Listen, Peer
        from bsns.node.server import ServeOptions, Server

        if public and join:
            raise BadOption("--public founds a new swarm, --join enters one; give only one of them")
        watching = asyncio.create_task(watch_parent(asyncio.current_task())) if leashed else None
        options = ServeOptions(blocks, parse_size(memory), cache_tokens, device, dtype, threads, Listen(host, port))
        with doing("looking at the model", quiet=as_json) as update:

            def told(what: str) -> None:
                update(what)
                if as_json:
                    emit({"event": "progress", "what": what})

            source = await asyncio.to_thread(resolve, model, progress=lambda what, _: told(what))
            told("joining the swarm" if join else "founding a swarm")
            peer = await (Peer.join(join, options.listen) if join else Peer.found(options.listen, open_swarm=public))
            try:
                server = await Server.start(peer, source, options, told)
            except BaseException:
                await peer.close()
                raise
        try:
            record = server.record
            if as_json:
                emit(
                    {
                        "event": "serving",
                        "id": record.peer,
                        "range": str(record.blocks),
                        "device": record.device,
                        "dtype": record.dtype,
                        "cache_tokens": record.cache_tokens,
                        "invite": None if join else peer.invite,
                    }
                )
            else:
                err.print(
                    f"[green]serving blocks {record.blocks} of {source.name}[/] on {record.device} in {record.dtype}, "
                    f"cache for {record.cache_tokens} tokens",
                    highlight=False,
                )
                if not join:
                    out.print("Others join with:")
                    out.print(f"  bsns serve {model} --join {peer.invite}", highlight=False, markup=False)
            await asyncio.Event().wait()
        finally:
            if watching:
                watching.cancel()
            await server.close()

    run(verb(), as_json=as_json)
