"""Capacity: what a node is told about itself, and what its machine has room for: device, dtype, range and cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, NotEnoughMemory, NotHere
from bsns.core.memory import MemoryUse
from bsns.core.plan import LEAST_CACHE_TOKENS
from bsns.model.source import ModelSource
from bsns.node.peer import Listen
from bsns.planning.joining import choose_range
from bsns.planning.memory import fitting_blocks
from bsns.protocol.records import NodeRecord
from bsns.swarm.election import LEASE_S
from bsns.swarm.records import MACHINE_BYTES
from bsns.worker.sessions import SessionTable

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
    first_blocks: str | None = None
    """What to begin with where `blocks` is `auto`; the orchestrator may move the node from there."""
    orchestrate: bool = True
    """Whether to stand for election. A node pinned to its blocks does not."""
    objective: str = "throughput"
    """What to plan for when elected: see core.plan.Objective."""
    lease_s: float = LEASE_S
    most_blocks: int | None = None
    """How many blocks planners may give the node, whatever its memory holds."""
    executor: str = "auto"
    """`native` or `torch`; see node.executors."""
    quant: str = "none"
    """What weights are kept in: as they are computed with (`none`), `int8` or `int4`."""
    kv: str = "none"
    """What keys and values are kept in: as they are computed with (`none`), or `int8`."""

    @property
    def follows(self) -> bool:
        """Whether the node takes the range that the orchestrator plans for it."""
        return self.blocks == "auto"


@dataclass(slots=True)
class Room:
    """What a node's memory has room for; sizes in bytes, beyond what the process takes without blocks."""

    usable_bytes: int
    block_bytes: Sequence[int]
    kv_bytes: int
    """Of one token and block."""
    row_bytes: int
    """Of one token's activations, which a session's journal keeps beside its caches."""
    cache_bytes: int
    """The most that goes to caches."""
    least_tokens: int
    """What the node has to promise whatever it holds."""
    most_tokens: int
    most_blocks: int | None = None
    """How many blocks the node lets planners give it, whatever it has room for."""
    planned_block_bytes: Sequence[int] | None = None
    """What planners take the blocks for, where the node keeps them in less."""
    baseline_bytes: int = 0
    """What the process takes without blocks."""

    def cache_tokens(self, ranges: Iterable[BlockRange], reserved: int = 0) -> int | None:
        """The tokens of cache to promise beside these ranges' weights; None if what has to be promised does not fit.

        Every token counts as one on the longest range, so that sessions may run on any.
        """
        held = list(ranges)
        free_bytes = self.usable_bytes - sum(self.block_bytes[block] for blocks in held for block in blocks)
        tokens = min(free_bytes, self.cache_bytes) // (self.kv_bytes * max(map(len, held)) + self.row_bytes)
        return min(tokens, self.most_tokens) if tokens >= max(self.least_tokens, reserved) else None

    def in_use(self, sessions: SessionTable) -> MemoryUse:
        """What is in memory now, as far as it can be reckoned."""
        held, every = sessions.ranges, sessions.all()
        return MemoryUse(
            baseline_bytes=self.baseline_bytes,
            weight_bytes=sum(self.block_bytes[block] for blocks in held for block in blocks),
            kv_bytes=sum(session.end * len(session.blocks) for session in every) * self.kv_bytes,
            journal_bytes=sum(session.journal.nbytes for session in every if session.journal is not None),
            promised_bytes=sessions.cache_tokens * (self.kv_bytes * max(map(len, held), default=0) + self.row_bytes),
        )

    def plannable_bytes(self, tokens: int) -> int:
        """The memory to announce to planners, who reckon with so many tokens of cache on every node.

        A node that has to promise more announces less, and one that keeps its weights in fewer bits announces more, so
        that it is planned as many average blocks as it can hold.
        """
        planned = self.planned_block_bytes or self.block_bytes
        own_bytes, planned_bytes = (sum(sizes) / len(sizes) for sizes in (self.block_bytes, planned))
        reckoned, real = (own_bytes + self.kv_bytes * promise for promise in (tokens, self.least_tokens))
        usable_bytes = max(0, self.usable_bytes - self.row_bytes * self.least_tokens)
        smaller = (planned_bytes + self.kv_bytes * tokens) / reckoned
        plannable_bytes = int(usable_bytes * min(1.0, reckoned / real) * smaller)
        if self.most_blocks is None:
            return plannable_bytes
        return min(plannable_bytes, self.most_blocks * (max(planned) + self.kv_bytes * tokens))


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


def machine_of(device: str, swarm: str) -> bytes:
    """Names the device, or the cores that this process may use: the same in all processes that share them.

    Empty where that cannot be told, and for a process whose control group has a quota: that is its own. It says nothing
    to anybody outside the swarm.
    """
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return b""
    with contextlib.suppress(OSError):
        if not Path("/sys/fs/cgroup", group, "cpu.max").read_text().startswith("max"):
            return b""
    what = device if device != "cpu" else str(sorted(os.sched_getaffinity(0)))
    return hashlib.blake2b(booted + what.encode(), key=swarm.encode(), digest_size=MACHINE_BYTES).digest()


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def least_cache_tokens(source: ModelSource) -> int:
    """The least cache that a node is of use with."""
    return min(LEAST_CACHE_TOKENS, source.context_tokens)


def usable_bytes(options: ServeOptions) -> int:
    """What may go to weights and caches, beyond what the process takes without them: asked before it has any."""
    if options.memory_bytes is not None:
        return max(0, options.memory_bytes - rss_bytes())
    return int(psutil.virtual_memory().available * 0.8)


def choose_blocks(
    options: ServeOptions,
    source: ModelSource,
    present: list[NodeRecord],
    block_bytes: list[int],
    kv_bytes: int,
    row_bytes: int,
) -> BlockRange:
    """The range asked for, or the one the swarm needs most among those that fit."""
    baseline_bytes = rss_bytes()
    memory_bytes = options.memory_bytes or usable_bytes(options) + baseline_bytes
    tokens = options.cache_tokens or least_cache_tokens(source)
    fit = fitting_blocks(memory_bytes, block_bytes, kv_bytes, tokens, baseline_bytes + row_bytes * tokens)
    asked = options.first_blocks if options.follows else options.blocks
    if asked is None:
        holders = [(r.blocks, 1.0 / max(r.block_time_s, 1e-6) if r.block_time_s else 1.0) for r in present]
        return choose_range(source.block_count, holders, fit)
    blocks = BlockRange.parse(asked, source.block_count)
    if len(blocks) > fit and options.memory_bytes:
        raise NotEnoughMemory(
            f"blocks {blocks} do not fit {options.memory_bytes / 2**20:.0f} MiB beside a cache of {tokens} tokens; "
            f"{fit} of them do: give --memory more, or fewer --blocks"
        )
    return blocks


def cache_tokens_of(
    options: ServeOptions,
    source: ModelSource,
    blocks: BlockRange,
    block_bytes: list[int],
    kv_bytes: int,
    row_bytes: int,
) -> int:
    """How many tokens of cache to promise: as asked, or what the memory leaves, up to a sensible lot."""
    if options.cache_tokens:
        return options.cache_tokens
    enough = CACHE_SESSIONS * max(source.context_tokens // 4, 1)
    if options.memory_bytes is None:
        budget = int(psutil.virtual_memory().available * 0.25)
    else:
        budget = options.memory_bytes - rss_bytes() - sum(block_bytes[i] for i in blocks)
    return max(min(enough, budget // (kv_bytes * len(blocks) + row_bytes)), least_cache_tokens(source))


def room_of(
    options: ServeOptions,
    source: ModelSource,
    cache_bytes: int,
    block_bytes: list[int],
    kv_bytes: int,
    row_bytes: int,
    planned_block_bytes: list[int] | None = None,
) -> Room:
    """What the node may hold when it moves; without a memory limit, its caches may take what they take at first."""
    return Room(
        usable_bytes=usable_bytes(options),
        block_bytes=block_bytes,
        kv_bytes=kv_bytes,
        row_bytes=row_bytes,
        cache_bytes=cache_bytes if options.memory_bytes is None else usable_bytes(options),
        least_tokens=options.cache_tokens or least_cache_tokens(source),
        most_tokens=options.cache_tokens or CACHE_SESSIONS * max(source.context_tokens // 4, 1),
        most_blocks=options.most_blocks,
        planned_block_bytes=planned_block_bytes,
        baseline_bytes=rss_bytes(),
    )
