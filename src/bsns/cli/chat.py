"""`bsns chat`: talk with a model over a swarm."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from bsns.cli import routing_options as routing
from bsns.cli import sampling_options as sampling
from bsns.cli.console import (
    DtypeOption,
    JoinOption,
    ModelArgument,
    ThreadsOption,
    doing,
    err,
    from_thread,
    out,
    run,
    say_error,
    see_through,
)
from bsns.core.errors import BsnsError

if TYPE_CHECKING:
    from bsns.client.sampling import SamplingOptions
    from bsns.node.client import Client


def chat(
    model: ModelArgument,
    join: JoinOption,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 1,
    objective: routing.Objective = "latency",
    weights: routing.Weights = None,
    warm_spares: routing.WarmSpares = False,
    wire: routing.Wire = "auto",
    speculate: routing.Speculate = True,
    draft: routing.Draft = None,
    temperature: sampling.Temperature = 0.7,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 0.95,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.Penalty = 1.0,
    seed: sampling.Seed = 0,
    stop: sampling.Stop = None,
    max_tokens: sampling.MaxTokens = 512,
) -> None:
    """Talk with a model over a swarm.

    An empty line or Ctrl-D ends the talk. MODEL is the one the swarm serves: its tokenizer, embedding and head run in
    this process, so that no text leaves it.

    Example:
      bsns chat smollm2-135m --join bsns1-…
    """

    async def verb() -> None:
        with doing("loading libraries") as say:
            from bsns.client.sampling import SamplingOptions
            from bsns.node.client import Client

            options = SamplingOptions(
                temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), max_tokens
            )
            client = Client(
                join,
                model,
                dtype=dtype,
                threads=threads,
                objective=objective,
                weights=weights,
                warm_spares=warm_spares,
                wire=wire,
                speculate=speculate,
                draft=draft,
            )
            say("joining the swarm")
            await client.__aenter__()
        try:
            await converse(client, options)
        finally:
            await see_through(client.close())

    run(verb())


async def converse(client: Client, options: SamplingOptions) -> None:
    """Questions from standard input, answers to standard output, until an empty line."""
    if sys.stdin.isatty():
        err.print("An empty line ends the talk.", style="dim")
    messages: list[dict[str, str]] = []
    while line := (await from_thread(_ask)).strip():
        messages.append({"role": "user", "content": line})
        text = ""
        try:
            async with contextlib.aclosing(client.stream(messages, options)) as pieces:
                async for piece in pieces:
                    text += piece.text
                    out.print(piece.text, end="", markup=False, highlight=False)
        except BsnsError as error:  # the talk goes on: the next question may find the swarm well again
            messages.pop()
            if text:
                out.print()
            say_error(error.message)
            continue
        out.print()
        messages.append({"role": "assistant", "content": text})


def _ask() -> str:
    """A line from standard input; empty at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""
