"""`bsns generate`: one answer from a swarm."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bsns.cli import sampling_options as sampling
from bsns.cli.console import DtypeOption, JoinOption, JsonFlag, doing, run


def generate(
    model: Annotated[str, typer.Argument(help="The model the swarm serves.")],
    join: JoinOption,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer; - reads standard input.")] = "-",
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    dtype: DtypeOption = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads for this end's share of the work.")] = 1,
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
    """Answer one prompt over a swarm, streaming.

    Example: bsns generate smollm2-135m --join bsns1-… --prompt "Name three rivers." --temperature 0.7
    """

    async def verb() -> None:
        from bsns.cli.up import answer
        from bsns.client.sampling import SamplingOptions
        from bsns.node.client import Client

        options = SamplingOptions(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()), max_tokens
        )
        text = sys.stdin.read() if prompt == "-" else prompt
        with doing("joining the swarm", quiet=as_json):
            client = await Client(join, model, dtype=dtype, threads=threads).__aenter__()
        try:
            await answer(client, text, options, raw=raw, as_json=as_json)
        finally:
            await client.close()

    run(verb(), as_json=as_json)
