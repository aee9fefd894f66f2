"""The orchestrator among real processes: it is elected, killed and replaced, and nodes move as it plans."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager

from processes import BLOCKS, Running, running, says, tiny
from processes import bsns as bsns_command
from running_time import running_s

import bsns
from bsns.core.blocks import BlockRange, missing_blocks
from bsns.node.peer import Peer
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.plans import lease_of, ranges_of

__all__ = ["tiny"]

LEASE_S = 3.0
DEADLINE_S = 60.0


def serve(tiny: str, *arguments: str, invite: str | None = None, block_time_ms: int = 0) -> Running:
    """A node that follows, with a short lease; for a stack to end."""
    env = {"BSNS_INVITE": invite or ""} | ({"BSNS_BLOCK_TIME_MS": str(block_time_ms)} if block_time_ms else {})
    common = ("--lease-s", str(LEASE_S), "--threads", "1", "--memory", "2GB", "--json")
    return Running("serve", tiny, *arguments, *common, env=env)


@asynccontextmanager
async def watching(invite: str) -> AsyncIterator[Peer]:
    """A member that only reads the directory."""
    peer = await Peer.join(invite, None)
    try:
        yield peer
    finally:
        await peer.close()


async def in_force(peer: Peer, wanted: Callable[[PlanRecord], bool], deadline_s: float = DEADLINE_S) -> PlanRecord:
    """The plan whose author has the best of the leases, once it is as wanted."""
    async with asyncio.timeout(deadline_s):
        while True:
            for plan in (plans := await peer.directory.plans()):
                if not any(lease_of(other).beats(lease_of(plan)) for other in plans) and wanted(plan):
                    return plan
            await asyncio.sleep(0.02)


async def renewed(peer: Peer, nodes: Collection[str]) -> PlanRecord:
    """The plan in force, once one of `nodes` has renewed its lease: of two that claim one term, one steps down."""
    first_s: dict[tuple[str, int], float] = {}

    def again(plan: PlanRecord) -> bool:
        return plan.author in nodes and plan.expires_s > first_s.setdefault((plan.author, plan.term), plan.expires_s)

    return await in_force(peer, again)


async def test_a_killed_orchestrator_is_replaced_and_no_answer_notices(
    tiny: str, record_property: Callable[[str, object], None]
) -> None:
    with contextlib.ExitStack() as stack:
        founder = stack.enter_context(running("serve", tiny, "--blocks", "0:2", "--threads", "1", "--json"))
        invite = founder.event("serving")["invite"]
        pinned = Running("serve", tiny, "--blocks", "2:4", "--threads", "1", "--json", env={"BSNS_INVITE": invite})
        stack.callback(pinned.kill)
        # no room for a session: they stand, and no answer runs on them
        standing = [serve(tiny, "--first-blocks", "0:4", "--cache-tokens", "16", invite=invite) for _ in range(2)]
        for node in standing:
            stack.callback(node.kill)
        pinned.event("serving")
        nodes = {node.event("serving")["id"]: node for node in standing}

        async with watching(invite) as peer, bsns.Client(invite, tiny) as client:
            await renewed(peer, nodes)
            records = {record.peer: record for record in await peer.directory.records()}
            assert {peer for peer, record in records.items() if record.follows} == set(nodes)
            assert {peer for peer, record in records.items() if record.draw} <= set(nodes)

            tokens: list[str] = []
            answer = client.generate("Hi", max_tokens=4000)
            async for text in answer:
                tokens.append(text)
                if len(tokens) == 20:
                    break
            # others must have seen it hold the lease, as they would have long since; then it dies without a word
            lease = await renewed(peer, nodes)
            nodes[lease.author].signal(signal.SIGKILL)
            killed_s = running_s()
            replaced = asyncio.create_task(in_force(peer, lambda plan: plan.term > lease.term))
            async for text in answer:
                tokens.append(text)
                if replaced.done() and len(tokens) >= 40:
                    break
            await answer.aclose()  # type: ignore[attr-defined]
            successor = await replaced
            took_s = running_s() - killed_s
            record_property("failover_s", round(took_s, 2))
            print(f"failover took {took_s:.2f} s, of a lease of {LEASE_S:g} s")
            assert successor.author in nodes
            assert successor.author != lease.author
            assert took_s < 2 * LEASE_S
            # the same tokens as an answer that nobody disturbed
            undisturbed = [text async for text in client.generate("Hi", max_tokens=len(tokens))]
            assert "".join(undisturbed).startswith("".join(tokens)[:-4])


async def test_nodes_move_as_planned_and_load_before_they_drop(tiny: str) -> None:
    async with AsyncExitStack() as stack:
        founder = serve(tiny, "--first-blocks", "0:3", block_time_ms=20)
        stack.callback(founder.kill)
        invite = founder.event("serving")["invite"]
        other = serve(tiny, "--first-blocks", "3:4", invite=invite, block_time_ms=20)
        stack.callback(other.kill)
        other.event("serving")
        peer = await stack.enter_async_context(watching(invite))

        def complete(records: list[NodeRecord]) -> bool:
            held = [blocks for record in records if record.state == "serving" for blocks in record.ranges]
            return not missing_blocks(held, BLOCKS)

        seen: list[dict[str, tuple[BlockRange, ...]]] = []

        async def settled() -> PlanRecord:
            while True:
                records = await peer.directory.records()
                if seen or complete(records):
                    assert complete(records), records
                    seen.append({record.peer: record.ranges for record in records})
                plans = await peer.directory.plans()
                planned = ranges_of(plans[0]) if plans else {}
                moved = any(ranges != seen[0][name] for name, ranges in seen[-1].items()) if seen else False
                if planned and moved and all(seen[-1].get(name) == (blocks,) for name, blocks in planned.items()):
                    return plans[0]
                await asyncio.sleep(0.02)

        async with asyncio.timeout(DEADLINE_S):
            plan = await settled()
        assert plan.version >= 1
        movers = {name for name, ranges in seen[0].items() if seen[-1][name] != ranges}
        assert movers
        for name in movers:  # each announced both ranges at once before it let go of the old
            old, new = seen[0][name][0], ranges_of(plan)[name]
            assert any(set(look[name]) == {old, new} for look in seen), (name, seen)
        async with bsns.Client(invite, tiny) as client:
            assert len([text async for text in client.generate("Hi", max_tokens=4)]) > 0


def test_an_objective_that_there_is_not_is_told() -> None:
    says(bsns_command("serve", "smollm2-135m", "--objective", "luck"), "luck", "throughput, latency, mixed")
