"""`bsns generate`: one answer from a swarm."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bsns.cli import routing_options as routing
from bsns.cli import sampling_options as sampling
from bsns.cli.console import (
    DtypeOption,
    JoinOption,
    JsonFlag,
    ModelArgument,
    ThreadsOption,
    doing,
    err,
    from_thread,
    run,
    see_through,
)
from bsns.cli.telemetry import OtlpOption, open_telemetry
from bsns.cli.up import answer, check_prompt


def generate(
    model: ModelArgument,
    join: JoinOption,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to answer; - reads standard input.")
    ] = "-",
    raw: sampling.RawFlag = False,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 1,
    objective: routing.Objective = "latency",
    weights: routing.Weights = None,
    warm_spares: routing.WarmSpares = False,
    wire: routing.Wire = "auto",
    speculate: routing.Speculate = True,
    draft: routing.Draft = None,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.Penalty = 1.0,
    seed: sampling.Seed = 0,
    stop: sampling.Stop = None,
    max_tokens: sampling.MaxTokens = 256,
    otlp: OtlpOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer one prompt over a swarm, streaming.

    MODEL is the one the swarm serves: its tokenizer, embedding and head run in this process, so that no text leaves it.

    Example:
      bsns generate smollm2-135m --join bsns1-… --prompt "Name three rivers."
    """

    async def verb() -> None:
        text = prompt
        if prompt == "-":
            if sys.stdin.isatty():
                err.print("the prompt, ended by Ctrl-D:", highlight=False)
            text = await from_thread(sys.stdin.read)
        check_prompt(text)
        telemetry = open_telemetry("bsns-generate", otlp)
        with doing("loading libraries", quiet=as_json) as say:
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
                tracer=telemetry.answers(model) if telemetry is not None else None,
            )
            say("joining the swarm")
            await client.__aenter__()
        try:
            await answer(client, text, options, raw=raw, as_json=as_json)
        finally:
            await see_through(client.close())
            if telemetry is not None:
                await telemetry.close()

    run(verb(), as_json=as_json)
