"""A node that serves a range of blocks: joins, chooses, loads, announces, follows the plan, and says goodbye."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Unpack

import msgspec
import structlog
import torch

import bsns
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, PeerFailed, PeerTimedOut
from bsns.core.plan import Objective, Plan
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.model.memory import give_back_freed
from bsns.model.shapes import block_bytes as block_bytes_of
from bsns.model.shapes import shape_of
from bsns.model.source import ModelSource
from bsns.node.capacity import (
    Room,
    ServeOptions,
    cache_tokens_of,
    choose_blocks,
    choose_device,
    choose_dtype,
    default_threads,
    least_cache_tokens,
    machine_of,
    room_of,
    rss_bytes,
)
from bsns.node.executors import choose_executor, load_executor, warm_up
from bsns.node.moving import Load, Mover
from bsns.node.orchestrator import Governing, Orchestrator, best_plan
from bsns.node.peer import Peer
from bsns.node.prober import Prober
from bsns.node.view import View
from bsns.protocol.records import NodeRecord
from bsns.protocol.tensors import DTYPE_BYTES
from bsns.swarm.proposals import Planner
from bsns.swarm.records import with_links
from bsns.transport.clock import Clock
from bsns.worker.calibration import calibrate
from bsns.worker.executor import Executor
from bsns.worker.faults import FaultyWorker, worker_class
from bsns.worker.service import Worker
from bsns.worker.sessions import SessionTable
from bsns.worker.throttle import throttled
from bsns.worker.tracing import StageTracer

__all__ = ["ServeOptions", "Server", "rss_bytes"]

log = structlog.get_logger(__name__)

ANNOUNCE_S = 30.0
RECORD_LIFETIME_S = 75.0
HAND_OVER_S = 10.0
"""How long a node that leaves serves the sessions it has still."""
LOOK_S = 2.0
"""How often a node looks whether its record is so out of date that others would choose wrongly."""
TAKEN_S = 20.0
AGAIN_S = 0.5
"""How long a node that comes up tries to announce itself, and how often."""
SPEED_CHANGE = 1.25
"""A node tells soon that it has become so many times slower or faster."""

Told = Callable[[str], None]
"""Is told in a few words what the node is doing."""


class Server:
    """A serving node. `start` brings it up; `close` takes it down with a goodbye."""

    def __init__(self, peer: Peer, worker: Worker, record: NodeRecord, *, probes: bool = True) -> None:
        """`probes`: whether it measures its ways to the others."""
        self.peer = peer
        self.worker = worker
        self.record = record
        self.mover: Mover | None = None
        self.orchestrator: Orchestrator | None = None
        here = View(peer.directory, record.model, None, record.block_count, clock=peer.clock)
        self.prober = Prober(peer.id, peer.dial, here.records, busy=worker.busy, clock=peer.clock)
        self._changed = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._tasks = [asyncio.create_task(self._announce())]
        if probes:
            self._tasks.append(asyncio.create_task(self.prober.run()))

    @classmethod
    async def start(
        cls,
        peer: Peer,
        source: ModelSource,
        options: ServeOptions,
        told: Told = lambda _: None,
        tracer: StageTracer | None = None,
    ) -> Server:
        """Choose a range, load it and serve it. Raises UserError for what the options make impossible."""
        device, objective = choose_device(options.device), Objective.named(options.objective)
        threads = options.threads or default_threads()
        torch.set_num_threads(threads)
        present = await View(peer.directory, source.model_id, None, source.block_count).records()
        dtype = choose_dtype(options.dtype, device, [record.dtype for record in present])
        planned_block_bytes = block_bytes_of(source, DTYPE_BYTES[dtype])
        block_bytes = block_bytes_of(source, DTYPE_BYTES[dtype], options.quant)
        kv_bytes = source.kv_bytes_per_token_per_block(DTYPE_BYTES[dtype], options.kv)
        row_bytes = source.hidden_size * DTYPE_BYTES[dtype]
        blocks = choose_blocks(options, source, present, block_bytes, kv_bytes, row_bytes)
        choice = choose_executor(
            source, blocks, device=device, quant=options.quant, kv=options.kv, prefer=options.executor
        )
        if choice.reason:
            log.info("computing with torch", reason=choice.reason)
        await asyncio.to_thread(warm_up, choice, source, blocks, dtype=dtype, device=device, quant=options.quant)
        cache_tokens = cache_tokens_of(options, source, blocks, block_bytes, kv_bytes, row_bytes)
        cache_bytes = cache_tokens * (kv_bytes * len(blocks) + row_bytes)
        room = room_of(options, source, cache_bytes, block_bytes, kv_bytes, row_bytes, planned_block_bytes)
        record = NodeRecord(
            peer=peer.id,
            addresses=peer.transport.addresses,
            model=source.model_id,
            model_name=source.name,
            block_count=source.block_count,
            start=blocks.start,
            end=blocks.end,
            state="joining",
            device=device,
            dtype=dtype,
            executor=choice.label,
            threads=threads,
            cache_tokens=cache_tokens,
            cache_tokens_left=cache_tokens,
            block_time_s=0.0,
            rss_bytes=rss_bytes(),
            version=bsns.__version__,
            started_s=peer.clock.unix_s(),
            expires_s=peer.clock.unix_s() + RECORD_LIFETIME_S,
            memory_bytes=room.plannable_bytes(least_cache_tokens(source)),
            follows=options.follows,
            quant=options.quant,
            kv=options.kv,
            baseline_bytes=room.baseline_bytes,
            machine=machine_of(device, peer.membership.swarm),
            share=min(1.0, threads / default_threads()) if device == "cpu" else 1.0,
        )
        told(f"joining swarm {peer.membership.swarm[:8]} for blocks {blocks}")
        joining = partial(peer.directory.publish, record)
        await taken(joining, peer.clock)  # others that choose now already count us
        kept = dtype if options.quant == "none" else options.quant
        told(
            f"loading blocks {blocks} of {source.name} ({sum(block_bytes[i] for i in blocks) / 2**20:.0f} MiB, {kept})"
        )

        def load(blocks: BlockRange) -> Executor:
            return throttled(
                load_executor(
                    choice,
                    source,
                    blocks,
                    dtype=dtype,
                    device=device,
                    threads=threads,
                    quant=options.quant,
                    kv=options.kv,
                )
            )

        executor = await asyncio.to_thread(load, blocks)
        told("measuring")
        calibration = await asyncio.to_thread(calibrate, executor)
        give_back_freed()
        record = msgspec.structs.replace(record, prefill_time_s=calibration.prefill_time_s)
        sessions = SessionTable(
            model=source.model_id,
            held=blocks,
            dtype=dtype,
            cache_tokens=cache_tokens,
            context_tokens=source.context_tokens,
        )
        worker = worker_class()(
            executor,
            sessions,
            peer.dial,
            block_time_s=calibration.block_time_s,
            rss_bytes=rss_bytes,
            memory=room.in_use,
            tracer=tracer,
        )
        if isinstance(worker, FaultyWorker):
            worker.heed_signals()
        await peer.listen(worker.serve)
        server = cls(peer, worker, record)
        await taken(server.publish, peer.clock)
        if options.follows:
            server.follow(
                room,
                load,
                shape_of(source, dtype),
                stands=options.orchestrate,
                objective=objective,
                cache_tokens=least_cache_tokens(source),
                lease_s=options.lease_s,
                planner=_planner(room),
            )
        return server

    def follow(self, room: Room, load: Load, shape: ModelShape, **governing: Unpack[Governing]) -> None:
        """Take from now on the range that the orchestrator plans for us; and be it, if that falls to us."""
        peer = self.peer
        self.mover = Mover(peer.id, self.worker, room, load, self.publish, peer.clock)
        self.orchestrator = Orchestrator(
            peer.directory,
            peer.membership,
            shape,
            obey=self.mover.obey,
            stand=self.stand,
            clock=peer.clock,
            **governing,
        )
        self._tasks += [asyncio.create_task(follow.run()) for follow in (self.mover, self.orchestrator)]

    async def publish(self) -> None:
        """Announce the node as it is now."""
        async with self._publishing:
            links = self.prober.links()
            coming = self.mover.coming if self.mover is not None else None
            renewed = _renewed(self.record, self.worker, self.peer.clock.unix_s(), coming)
            self.record = with_links(renewed, links, self.peer.membership)
            await self.peer.directory.publish(self.record)
            self.prober.published(links)

    def stand(self, draw: bytes) -> None:
        """Announce our draw for the next election, soon."""
        self.record = msgspec.structs.replace(self.record, draw=draw)
        self._changed.set()

    async def hand_over(self, deadline_s: float = HAND_OVER_S) -> None:
        """Say goodbye, and serve the sessions there are until their clients have led them elsewhere."""
        await self._say_goodbye()
        self.worker.leave()
        give_up_s = self.peer.clock.now_s() + deadline_s
        while len(self.worker.sessions) and self.peer.clock.now_s() < give_up_s:  # noqa: ASYNC110  the table tells nobody
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Say goodbye, stop serving, and leave the network."""
        await self._say_goodbye()
        await self.worker.close()
        await self.peer.close()

    async def _say_goodbye(self) -> None:
        """Once."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(3.0):
                await self.peer.directory.withdraw(self.record)
        except (BsnsError, TimeoutError) as error:
            log.info("goodbye was not heard; the record will expire", reason=str(error))

    async def _announce(self) -> None:
        published_s, trouble = self.peer.clock.now_s(), ""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass  # nobody says so, but it may have changed
            left = self.worker.sessions.cache_tokens_left
            changed = self._changed.is_set() or self.prober.has_news()
            changed |= abs(left - self.record.cache_tokens_left) > self.record.cache_tokens / 8
            changed |= _differs(self.worker.block_time_s, self.record.block_time_s)
            if self.peer.clock.now_s() - published_s < ANNOUNCE_S and not changed:
                continue
            self._changed.clear()
            try:
                await self.publish()
            except BsnsError as error:
                if error.code != trouble:
                    log.warning("could not announce; trying again", reason=error.message)
                trouble = error.code
            except Exception:
                log.exception("could not announce; trying again")  # a node that falls silent here is lost to all
            else:
                published_s, trouble = self.peer.clock.now_s(), ""
                continue
            self._changed.set()
            await asyncio.sleep(LOOK_S)


async def taken(publish: Callable[[], Awaitable[None]], clock: Clock) -> None:
    """Announce a node that comes up, again while nobody takes it: where all come up at once, others have no time yet.

    Raises what the last attempt does, TAKEN_S after the first.
    """
    give_up_s = clock.now_s() + TAKEN_S
    while True:
        try:
            await publish()
        except (PeerFailed, PeerTimedOut) as error:
            if clock.now_s() >= give_up_s:
                raise
            log.info("could not announce; trying again", reason=error.message)
            await asyncio.sleep(AGAIN_S)
        else:
            return


def _planner(room: Room) -> Planner:
    """The planner; from its first use on its libraries count as part of what the process takes."""

    def plan(snapshot: Snapshot, shape: ModelShape, objective: Objective, cache_tokens: int) -> Plan:
        if "bsns.planning.planner" not in sys.modules:
            before_bytes = rss_bytes()
            importlib.import_module("bsns.planning.planner")
            room.baseline_bytes += max(0, rss_bytes() - before_bytes)
        return best_plan(snapshot, shape, objective, cache_tokens)

    return plan


def _differs(now_s: float, said_s: float) -> bool:
    """Whether a node has become so much slower or faster than it says that others would plan badly."""
    return not said_s / SPEED_CHANGE <= now_s <= said_s * SPEED_CHANGE


def _renewed(record: NodeRecord, worker: Worker, now_s: float, coming: BlockRange | None = None) -> NodeRecord:
    """The record with the worker's present numbers, at `now_s` (Unix time).

    `serving` is what takes new sessions, if anything does; where nothing does, the node is `joining` for what is
    `coming`.
    """
    now, sessions = worker.description(), worker.sessions
    first, *others = sessions.open_ranges or (coming or record.blocks,)
    return msgspec.structs.replace(
        record,
        state="serving" if sessions.open_ranges else "joining",
        start=first.start,
        end=first.end,
        others=tuple((blocks.start, blocks.end) for blocks in others),
        cache_tokens=now.cache_tokens,
        cache_tokens_left=now.cache_tokens_left,
        block_time_s=now.block_time_s,
        rss_bytes=now.rss_bytes,
        baseline_bytes=now.memory.baseline_bytes or record.baseline_bytes,
        sessions=now.sessions,
        started_s=min(record.started_s, now_s),  # a clock may have been set back since
        expires_s=now_s + RECORD_LIFETIME_S,
    )
