"""Several answers at once, and how fast their tokens come: through a client of ours, or through an OpenAI API."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from bsns.client.sampling import SamplingOptions
from bsns.core.errors import PeerFailed, PeerTimedOut
from bsns.node.client import Client


@dataclass(frozen=True, slots=True)
class Api:
    """Where chats are asked for, as whom, and of which model."""

    url: str
    key: str
    model: str


def together(times_s: Sequence[Sequence[float]]) -> float:
    """Tokens per second of answers whose tokens came at these times.

    While all of them are under way, if most tokens came then; otherwise, where they are computed one after the other,
    from the first token of any to the last. Raises PeerTimedOut if there are not two tokens.
    """
    every = sorted(at for times in times_s for at in times)
    if every and all(times_s):
        begin, end = max(times[0] for times in times_s), min(times[-1] for times in times_s)
        inside = sum(begin < at <= end for at in every)
        if inside > len(every) / 2:
            return inside / (end - begin)
    if len(every) < 2 or every[-1] == every[0]:
        raise PeerTimedOut("there were no tokens in time to take a speed of; use a smaller model, or a faster machine")
    return (len(every) - 1) / (every[-1] - every[0])


async def client_rate(client: Client, texts: Sequence[str], tokens: int, *, seconds: float) -> float:
    """Tokens per second of answers of so many tokens to all of the texts at once; after so many seconds what has not
    ended is broken off. Raises as Client.stream does, and PeerTimedOut."""
    times_s: list[list[float]] = [[] for _ in texts]

    async def answer(text: str, times: list[float]) -> None:
        async with contextlib.aclosing(client.stream(text, SamplingOptions(max_tokens=tokens))) as pieces:
            async for _ in pieces:
                times.append(time.perf_counter())  # noqa: PERF401  what came before a cancellation is counted

    await _at_once([answer(text, times) for text, times in zip(texts, times_s, strict=True)], seconds)
    return together(times_s)


async def api_rate(
    api: Api, texts: Sequence[str], tokens: int, *, seconds: float, temperature: float = 0.0, apart_s: float = 0.0
) -> float:
    """The same of chats through an API, which are begun so far apart. Raises PeerFailed, PeerTimedOut.

    Pieces of text are timed; where the API says how many tokens they were, the speed is that of the tokens.
    """
    import openai  # of who measures, not of who serves

    times_s: list[list[float]] = [[] for _ in texts]
    used: list[int] = []

    async def answer(number: int) -> None:
        await asyncio.sleep(number * apart_s)
        text, times = texts[number], times_s[number]
        stream = await client.chat.completions.create(
            model=api.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=tokens,
            temperature=temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                used.append(chunk.usage.completion_tokens)
            if any(choice.delta.content for choice in chunk.choices):
                times.append(time.perf_counter())

    async with openai.AsyncOpenAI(base_url=api.url, api_key=api.key, max_retries=0, timeout=2 * seconds) as client:
        try:
            await _at_once([answer(number) for number in range(len(texts))], seconds)
        except openai.APIError as error:
            raise PeerFailed(f"{api.url} did not answer: {error}") from error
    pieces = sum(map(len, times_s))
    return together(times_s) * (sum(used) / pieces if len(used) == len(texts) and pieces else 1.0)


async def _at_once(answers: Sequence[Coroutine[None, None, None]], seconds: float) -> None:
    """All of them, or the first error, or so long; none is left under way."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in ended:
        task.result()


async def offered(api: Api) -> bool:
    """Whether the API has its model."""
    import openai

    async with openai.AsyncOpenAI(base_url=api.url, api_key=api.key, max_retries=0, timeout=5.0) as client:
        try:
            return any([model.id == api.model async for model in client.models.list()])
        except openai.APIError:
            return False
