"""Probes a worker is sent: answered up to an allowance, and never so many that its sessions starve."""

from __future__ import annotations

import asyncio

from memory_swarm import MemorySwarm
from test_service import HELD, Adder, Caller, opening

from bsns.core.ids import PeerId
from bsns.protocol.frames import encode
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import Opened, Ping, Pong
from bsns.protocol.probing import MAX_PROBE_BYTES, Probe, Probed
from bsns.protocol.tensors import TensorSpec
from bsns.swarm.allowances import MAX_REFUSALS, PEER_BURST_BYTES


def probe(nonce: int, size: int = MAX_PROBE_BYTES) -> tuple[Probe, bytes]:
    return Probe(nonce, (TensorSpec.raw("probe", "int64", (size // 8,)),)), bytes(size)


def many(count: int, size: int) -> bytes:
    """So many probes, back to back."""
    frames = (encode(message, [body]) for message, body in (probe(nonce, size) for nonce in range(count)))
    return b"".join(bytes(piece) for frame in frames for piece in frame)


async def scene(swarm: MemorySwarm, *names: str) -> list[Caller]:
    node = await swarm.add_node("node", Adder(HELD), block_count=8, context_tokens=64)
    node.worker._now_s = lambda: 0.0  # allowances grow with time
    callers = [Caller(await swarm.network.transport(name).dial(PeerId("node"))) for name in names]
    assert isinstance(await callers[0].ask(opening(node)), Opened)
    return callers


async def test_a_probe_is_answered_and_one_too_many_told_to_wait(swarm: MemorySwarm) -> None:
    (caller,) = await scene(swarm, "prober")
    taken = int(PEER_BURST_BYTES) // MAX_PROBE_BYTES
    for nonce in range(taken):
        assert await caller.ask(*probe(nonce)) == Probed(nonce)
    refused = await caller.ask(*probe(99))
    assert isinstance(refused, Probed)
    assert refused.nonce == 99
    assert 0 < refused.wait_s <= 1.0


async def test_a_flood_ends_its_stream_and_starves_nobody(swarm: MemorySwarm) -> None:
    caller, flooder = await scene(swarm, "client", "flooder")
    flood = asyncio.create_task(flooder.stream.send_bytes(many(2000, 4096)))
    for position in range(20):
        await caller.step(position, 1)
        await caller.result()
    await flood
    answers = []
    while not isinstance((message := (await flooder.hear())[0]), Refusal):
        answers.append(message)
    assert message.code == "BadFrame"
    probed = [answer for answer in answers if isinstance(answer, Probed)]
    assert len(probed) == len(answers)
    taken = sum(answer.wait_s == 0 for answer in probed)
    assert taken <= PEER_BURST_BYTES / 4096 + 64  # and what a second's allowance adds meanwhile
    assert len(probed) - taken <= MAX_REFUSALS + 1
    assert await caller.ask(Ping(5)) == Pong(5)


async def test_who_was_cut_off_is_not_let_go_on_over_a_new_stream(swarm: MemorySwarm) -> None:
    (flooder,) = await scene(swarm, "flooder")
    await flooder.stream.send_bytes(many(2 * MAX_REFUSALS, MAX_PROBE_BYTES))
    while not isinstance((await flooder.hear())[0], Refusal):
        pass
    again = Caller(await swarm.nodes["node"].transport._network.transport("flooder").dial(PeerId("node")))
    assert isinstance(await again.ask(*probe(1)), Refusal)


async def test_a_probe_beyond_the_limit_breaks_the_protocol(swarm: MemorySwarm) -> None:
    (caller,) = await scene(swarm, "prober")
    answer = await caller.ask(*probe(1, MAX_PROBE_BYTES + 8))
    assert isinstance(answer, Refusal)
    assert str(MAX_PROBE_BYTES) in answer.message
