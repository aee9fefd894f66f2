"""What a client counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from memory_swarm import MemorySwarm, StageShelf, answer, until
from test_speculation import Oracle
from tiny_models import prompt

from bsns.client.sampling import SamplingOptions
from bsns.compression.rows import encode
from bsns.protocol.codecs import CODECS

CUTS = (0, 2, 5)
GREEDY = SamplingOptions(max_tokens=20)


async def test_guesses_and_bytes(swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")
    await swarm.add_stages(shelf.stages(path, CUTS), block_count=CUTS[-1])
    ends = shelf.ends(path)
    plain = swarm.client(ends, choose_codec=lambda sender, receiver: "int8" if sender is None else "raw")
    line = [*prompt(9), *await answer(plain, prompt(9), GREEDY)]
    coded = CODECS["int8"].row_bytes(ends.hidden_size, "float32")
    assert len(encode("int8", bytes(4 * ends.hidden_size), "float32", ends.hidden_size)) == coded
    assert plain.tally.sent_bytes == {"int8": coded * (9 + 19)}
    assert plain.tally.received_bytes == {"raw": 4 * ends.hidden_size * 20}
    assert (plain.tally.guesses, plain.tally.right, plain.tally.waiting) == (0, 0, 0)

    oracle = Oracle(line)
    guessing = swarm.client(ends, guesser=lambda: oracle)
    await answer(guessing, prompt(9), GREEDY)
    assert guessing.tally.guesses == guessing.tally.right > 10


async def test_answers_that_wait_for_room(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    await swarm.add_stages(shelf.stages(path, (0, 5)), block_count=CUTS[-1], cache_tokens=64)
    client = swarm.client(shelf.ends(path))
    first, second = (client.stream(prompt(20), SamplingOptions(max_tokens=30)) for _ in range(2))
    await anext(first)
    waiting = asyncio.ensure_future(anext(second))
    await until(lambda: client.tally.waiting == 1)
    await first.aclose()
    await waiting
    assert client.tally.waiting == 0
    await second.aclose()
