"""The Python API: a client and its synchronous face, over the nodes of a real swarm."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

import psutil
import pytest
from processes import CONTEXT, Running, running, swarm, tiny
from running_time import running_s

import bsns
from bsns.core.errors import BadOption, InviteInvalid, MissingBlocks, ModelNotFound, PromptTooLong

__all__ = ["swarm", "tiny"]


async def freed(client: bsns.Client, deadline_s: float = 5.0) -> None:
    """Waits until no node holds a session or a token of cache."""
    async with asyncio.timeout(deadline_s):
        while await busy(client) or any(
            node.now is None or node.now.cache_tokens_left != node.now.cache_tokens for node in await client.status()
        ):
            pass


async def busy(client: bsns.Client) -> bool:
    """Whether a node has a session open."""
    return any(node.now is None or node.now.sessions for node in await client.status())


async def answer(client: bsns.Client, prompt: str, **sampling: Any) -> str:
    return "".join([text async for text in client.generate(prompt, **sampling)])


async def test_an_answer_as_it_comes(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as client:
        texts = [text async for text in client.generate("Hi", max_tokens=8)]
        assert 1 < len(texts) <= 8
        assert "".join(texts) == await answer(client, "Hi", max_tokens=8)
        await freed(client)


async def test_a_conversation(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as client:
        messages = [{"role": "user", "content": "Hi"}]
        assert client.tokens(messages) == client.tokens("Hi")
        assert client.tokens("Hi", raw=True) != client.tokens("Hi")
        with pytest.raises(BadOption):
            client.tokens(messages, raw=True)


async def test_the_same_seed_gives_the_same_answer(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as client:
        drawn = [await answer(client, "Hi", temperature=1.0, seed=seed, max_tokens=8) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


async def test_a_draft_model_changes_no_answer(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny, speculate=False) as client:
        options = {"temperature": 1.0, "seed": 3, "max_tokens": 40}
        expected = [await answer(client, "Hi", max_tokens=40), await answer(client, "Hi", **options)]
    async with bsns.Client(swarm[1], tiny, draft=tiny) as client:
        assert [await answer(client, "Hi", max_tokens=40), await answer(client, "Hi", **options)] == expected
        await freed(client)
    with pytest.raises(BadOption, match="--no-speculate"):
        bsns.Client(swarm[1], tiny, draft=tiny, speculate=False)


async def test_closing_half_way_frees_the_cache(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as client:
        async with contextlib.aclosing(client.generate("Hi", max_tokens=30000)) as texts:
            await anext(texts)
            nodes = await client.status()
            assert len(nodes) == 2
            assert all(node.now is not None and node.now.sessions == 1 for node in nodes)
        await freed(client)


async def test_a_cancelled_reader_frees_the_cache(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as client:
        reading = asyncio.create_task(answer(client, "Hi", max_tokens=30000))
        async with asyncio.timeout(5):
            while not await busy(client):
                pass
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await freed(client)


async def test_two_clients_at_once(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as one, bsns.Client(swarm[1], tiny) as two:
        alone = await answer(one, "Hi", max_tokens=30)
        other = await answer(two, "What is it?", max_tokens=30)
        together = await asyncio.gather(
            *(answer(client, prompt, max_tokens=30) for client in (one, two) for prompt in ("Hi", "What is it?"))
        )
        assert together == [alone, other, alone, other]
        await freed(one)


async def test_leaving_with_an_answer_open_frees_the_cache(tiny: str, swarm: tuple[Running, str]) -> None:
    async with bsns.Client(swarm[1], tiny) as witness:
        client = bsns.Client(swarm[1], tiny)
        async with client:
            texts = client.generate("Hi", max_tokens=30000)
            await anext(texts)
        await freed(witness)
        with contextlib.suppress(Exception):
            await texts.aclose()


async def test_errors_are_typed(tiny: str, swarm: tuple[Running, str]) -> None:
    with pytest.raises(InviteInvalid):
        await bsns.Client("nonsense", tiny).__aenter__()
    with pytest.raises(ModelNotFound):
        await bsns.Client(swarm[1], "no-such-model").__aenter__()
    async with bsns.Client(swarm[1], tiny) as client:
        with pytest.raises(BadOption):
            await answer(client, "Hi", temperature=-1)
        with pytest.raises(PromptTooLong, match=str(CONTEXT)):
            await answer(client, "word " * (CONTEXT + 1), raw=True)
        await freed(client)


def freed_in_time(client: bsns.SyncClient) -> None:
    give_up_s = running_s() + 5
    while any(node.now is None or node.now.sessions for node in client.status()):
        assert running_s() < give_up_s


def test_the_synchronous_face(tiny: str, swarm: tuple[Running, str]) -> None:
    with bsns.SyncClient(swarm[1], tiny) as client:
        whole = "".join(client.generate("Hi", max_tokens=8))
        freed_in_time(client)
        texts = client.generate("Hi", max_tokens=30000)
        assert whole.startswith(next(texts))
        assert all(node.now is not None and node.now.sessions == 1 for node in client.status())
        texts.close()
        freed_in_time(client)
        texts = client.generate("Hi", max_tokens=30000)
        next(texts)
    for late in (texts, client.generate("Hi"), bsns.SyncClient(swarm[1], tiny).generate("Hi")):
        with pytest.raises(RuntimeError, match="use `with"):
            next(late)
    with pytest.raises(InviteInvalid), bsns.SyncClient("nonsense", tiny):
        pass


def test_clients_leave_no_daemon() -> None:
    """Runs after clients came and went in this process: of theirs nothing is left, only the shared swarm's family."""
    ours = [child for child in psutil.Process().children() if "p2pd" in child.name()]
    assert ours == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_lost_in_the_middle_of_an_answer(tiny: str, signum: signal.Signals) -> None:
    with running("serve", tiny, "--blocks", "0:2", "--threads", "1", "--json") as first:
        invite = await asyncio.to_thread(lambda: first.event("serving")["invite"])
        # by themselves: `bsns up` would start it again
        with running("serve", tiny, "--blocks", "2:4", "--join", invite, "--threads", "1", "--json") as second:
            await asyncio.to_thread(second.event, "serving")
            async with bsns.Client(invite, tiny, deadline_s=3.0) as client:
                texts = client.generate("Hi", max_tokens=30000)
                await anext(texts)
                started_s = running_s()
                second.signal(signum)
                with pytest.raises(MissingBlocks, match="it is needed because"):
                    async for _ in texts:
                        pass
                assert running_s() - started_s < 6
