"""A node that serves a range of blocks: joins, chooses, loads, announces, and says goodbye."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import psutil
import structlog
import torch

import bsns
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, BsnsError, NotEnoughMemory, NotHere
from bsns.model.shapes import block_bytes as block_bytes_of
from bsns.model.source import ModelSource
from bsns.model.stage import Stage
from bsns.node.peer import Listen, Peer
from bsns.node.view import View
from bsns.planning.joining import choose_range
from bsns.planning.memory import fitting_blocks
from bsns.protocol.records import NodeRecord
from bsns.protocol.tensors import DTYPE_BYTES
from bsns.worker.calibration import calibrate
from bsns.worker.service import Worker
from bsns.worker.sessions import SessionTable
from bsns.worker.throttle import throttled
from bsns.worker.torch_executor import TorchExecutor

log = structlog.get_logger(__name__)

ANNOUNCE_S = 30.0
RECORD_LIFETIME_S = 75.0
LOOK_S = 2.0
"""How often a node looks whether its record is so out of date that others would choose wrongly."""
LEAST_CACHE_TOKENS = 2048
CACHE_SESSIONS = 32
"""Without a memory limit, cache is kept for this many sessions of a quarter of the context."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a node is told about itself; `auto` leaves it to the node."""

    blocks: str = "auto"
    memory_bytes: int | None = None
    cache_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    listen: Listen = field(default_factory=Listen)


Told = Callable[[str], None]
"""Is told in a few words what the node is doing."""


class Server:
    """A serving node. `start` brings it up; `close` takes it down with a goodbye."""

    def __init__(self, peer: Peer, source: ModelSource, worker: Worker, record: NodeRecord) -> None:
        self.peer = peer
        self.source = source
        self.worker = worker
        self.record = record
        self._announcing = asyncio.create_task(self._announce())

    @classmethod
    async def start(cls, peer: Peer, source: ModelSource, options: ServeOptions, told: Told = lambda _: None) -> Server:
        """Choose a range, load it and serve it. Raises UserError for what the options make impossible."""
        device = choose_device(options.device)
        torch.set_num_threads(options.threads or default_threads())
        present = await View(peer.directory, source.model_id, None, source.block_count).records()
        dtype = choose_dtype(options.dtype, device, [record.dtype for record in present])
        block_bytes = block_bytes_of(source, DTYPE_BYTES[dtype])
        kv_bytes = source.kv_bytes_per_token_per_block(DTYPE_BYTES[dtype])
        blocks = _choose_blocks(options, source, present, block_bytes, kv_bytes)
        cache_tokens = _cache_tokens(options, source, blocks, block_bytes, kv_bytes)
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
            executor=TorchExecutor.name,
            threads=torch.get_num_threads(),
            cache_tokens=cache_tokens,
            cache_tokens_left=cache_tokens,
            block_time_s=0.0,
            rss_bytes=rss_bytes(),
            version=bsns.__version__,
            started_s=time.time(),
            expires_s=time.time() + RECORD_LIFETIME_S,
            memory_bytes=usable_bytes(options),
        )
        told(f"joining swarm {peer.membership.swarm[:8]} for blocks {blocks}")
        await peer.directory.publish(record)  # others that choose now already count us
        told(
            f"loading blocks {blocks} of {source.name} ({sum(block_bytes[i] for i in blocks) / 2**20:.0f} MiB, {dtype})"
        )
        stage = await asyncio.to_thread(Stage, source.path, blocks, dtype=dtype, device=device)
        executor = throttled(TorchExecutor(stage, dtype=dtype))
        told("measuring")
        calibration = await asyncio.to_thread(calibrate, executor)
        record = msgspec.structs.replace(record, prefill_time_s=calibration.prefill_time_s)
        sessions = SessionTable(
            model=source.model_id,
            held=blocks,
            dtype=dtype,
            cache_tokens=cache_tokens,
            context_tokens=source.context_tokens,
        )
        worker = Worker(executor, sessions, peer.dial, block_time_s=calibration.block_time_s, rss_bytes=rss_bytes)
        await peer.listen(worker.serve)
        server = cls(peer, source, worker, record)
        await server.publish("serving")
        return server

    async def publish(self, state: str) -> None:
        """Announce the node as it is now."""
        now = self.worker.description()
        self.record = _renewed(self.record, state, now.cache_tokens_left, now.block_time_s, now.rss_bytes)
        await self.peer.directory.publish(self.record)

    async def close(self) -> None:
        """Say goodbye, stop serving, and leave the network."""
        self._announcing.cancel()
        try:
            async with asyncio.timeout(3.0):
                await self.peer.directory.withdraw(self.record)
        except (BsnsError, TimeoutError) as error:
            log.info("goodbye was not heard; the record will expire", reason=str(error))
        await self.worker.close()
        await self.peer.close()

    async def _announce(self) -> None:
        published_s = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            left = self.worker.sessions.cache_tokens_left
            changed = abs(left - self.record.cache_tokens_left) > self.record.cache_tokens / 8
            if time.monotonic() - published_s < ANNOUNCE_S and not changed:
                continue
            try:
                await self.publish("serving")
            except BsnsError as error:
                log.warning("could not announce; trying again", reason=error.message)
            except Exception:
                log.exception("could not announce; trying again")  # a node that falls silent here is lost to all
            else:
                published_s = time.monotonic()


def _renewed(record: NodeRecord, state: str, cache_left: int, block_time_s: float, rss: int) -> NodeRecord:
    return msgspec.structs.replace(
        record,
        state=state,
        cache_tokens_left=cache_left,
        block_time_s=block_time_s,
        rss_bytes=rss,
        expires_s=time.time() + RECORD_LIFETIME_S,
    )


def choose_device(device: str) -> str:
    """`auto` takes CUDA, then Apple's GPU, then the CPU. Raises BadOption for a device that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device.split(":")[0], False):
        raise BadOption(
            f"there is no device {device!r} here; available: {', '.join(n for n, ok in there.items() if ok)}"
        )
    return device


def choose_dtype(dtype: str, device: str, in_use: list[str]) -> str:
    """`auto` follows the swarm, or takes bfloat16 where the device computes in it. Raises BadOption, NotHere."""
    if dtype == "auto":
        if in_use:
            return max(set(in_use), key=in_use.count)
        fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bfloat16" if fast else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise BadOption(f"dtype {dtype!r} is not known; use auto, float32 or bfloat16")
    if in_use and dtype not in in_use:
        raise NotHere(f"this swarm serves the model in {in_use[0]}; a node in {dtype} would be of no use to it")
    return dtype


def default_threads() -> int:
    """One thread for each core the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def usable_bytes(options: ServeOptions) -> int:
    """What may go to weights and caches, beyond what the process takes without them: asked before it has any."""
    if options.memory_bytes is not None:
        return max(0, options.memory_bytes - rss_bytes())
    return int(psutil.virtual_memory().available * 0.8)


def _choose_blocks(
    options: ServeOptions, source: ModelSource, present: list[NodeRecord], block_bytes: list[int], kv_bytes: int
) -> BlockRange:
    """The range asked for, or the one the swarm needs most among those that fit."""
    baseline_bytes = rss_bytes()
    memory_bytes = usable_bytes(options) + baseline_bytes
    tokens = options.cache_tokens or min(LEAST_CACHE_TOKENS, source.context_tokens)
    fit = fitting_blocks(memory_bytes, block_bytes, kv_bytes, tokens, baseline_bytes)
    if options.blocks == "auto":
        holders = [(r.blocks, 1.0 / max(r.block_time_s, 1e-6) if r.block_time_s else 1.0) for r in present]
        return choose_range(source.block_count, holders, fit)
    blocks = BlockRange.parse(options.blocks, source.block_count)
    if len(blocks) > fit and options.memory_bytes:
        raise NotEnoughMemory(
            f"blocks {blocks} do not fit {options.memory_bytes / 2**20:.0f} MiB beside a cache of {tokens} tokens; "
            f"{fit} of them do: give --memory more, or fewer --blocks"
        )
    return blocks


def _cache_tokens(
    options: ServeOptions, source: ModelSource, blocks: BlockRange, block_bytes: list[int], kv_bytes: int
) -> int:
    """How many tokens of cache to promise: as asked, or what the memory leaves, up to a sensible lot."""
    if options.cache_tokens:
        return options.cache_tokens
    enough = CACHE_SESSIONS * max(source.context_tokens // 4, 1)
    if options.memory_bytes is None:
        budget = int(psutil.virtual_memory().available * 0.25)
    else:
        budget = options.memory_bytes - rss_bytes() - sum(block_bytes[i] for i in blocks)
    return max(min(enough, budget // (kv_bytes * len(blocks))), min(LEAST_CACHE_TOKENS, source.context_tokens))
