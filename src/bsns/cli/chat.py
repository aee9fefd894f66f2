"""`bsns chat`: talk with a model over a swarm."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from bsns.cli import sampling_options as sampling
from bsns.cli.console import DtypeOption, JoinOption, doing, err, out, run
from bsns.core.errors import BsnsError

if TYPE_CHECKING:
    from bsns.client.sampling import SamplingOptions
    from bsns.node.client import Client


def chat(
    model: Annotated[str, typer.Argument(help="The model the swarm serves.")],
    join: JoinOption,
    dtype: DtypeOption = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads for this end's share of the work.")] = 1,
    temperature: sampling.Temperature = 0.7,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 0.95,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.Penalty = 1.0,
    seed: sampling.Seed = 0,
    stop: sampling.Stop = None,
    max_tokens: sampling.MaxTokens = 512,
) -> None:
    """Talk with a model over a swarm. An empty line or Ctrl-D ends the talk.

    Example: bsns chat smollm2-135m --join bsns1-…
    """

    async def verb() -> None:
        from bsns.client.sampling import SamplingOptions
        from bsns.node.client import Client

        options = SamplingOptions(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), max_tokens
        )
        with doing("joining the swarm"):
            client = await Client(join, model, dtype=dtype, threads=threads).__aenter__()
        try:
            await converse(client, options)
        finally:
            await client.close()

    run(verb())


async def converse(client: Client, options: SamplingOptions) -> None:
    """Questions from standard input, answers to standard output, until an empty line."""
    messages: list[dict[str, str]] = []
    while line := (await _ask()).strip():
        messages.append({"role": "user", "content": line})
        text = ""
        try:
            async for piece in client.stream(messages, options):
                text += piece.text
                out.print(piece.text, end="", markup=False, highlight=False)
        except BsnsError as error:  # the talk goes on: the next question may find the swarm well again
            messages.pop()
            err.print(f"\n[bold red]error:[/] {error.message}", highlight=False)
            continue
        out.print()
        messages.append({"role": "assistant", "content": text})


async def _ask() -> str:
    """A line from standard input, without holding up the event loop; empty at its end."""
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        try:
            line = input("> ")
        except EOFError:
            line = ""
        loop.call_soon_threadsafe(answer, line)

    def answer(line: str) -> None:
        if not asked.done():
            asked.set_result(line)

    threading.Thread(target=read, name="input", daemon=True).start()  # a daemon: Ctrl-C must not wait for a line
    return await asked
