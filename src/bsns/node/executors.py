"""Which executor computes a node's blocks: the native one where it can, else the model library's own layers."""

from __future__ import annotations

from dataclasses import dataclass

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.model.configuration import read_config
from bsns.model.source import ModelSource
from bsns.native.architecture import NotNative, describe
from bsns.native.library import native_library
from bsns.native.stage import SAME, NativeStage
from bsns.worker.executor import Executor
from bsns.worker.native_executor import NativeExecutor

NATIVE, TORCH, AUTO = "native", "torch", "auto"
QUANTS = ("none", "int8", "int4")
KVS = ("none", "int8")
EXECUTORS = (AUTO, NATIVE, TORCH)
MAX_LABEL = 64
"""Characters of it that a record may carry (swarm.records)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An executor, and why it is not the native one where nobody asked for another."""

    name: str
    reason: str = ""

    @property
    def label(self) -> str:
        """As a record says it: short, and printable."""
        text = f"{self.name}: {self.reason}" if self.reason else self.name
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def choose_executor(
    source: ModelSource, blocks: BlockRange, *, device: str, quant: str = "none", kv: str = "none", prefer: str = AUTO
) -> Choice:
    """What is to compute this range here, without loading it. `quant`, `kv`: what weights, and keys and values, are
    kept in.

    Raises BadOption for options nobody knows, and where what was asked for cannot be.
    """
    for option, value, known in (("--executor", prefer, EXECUTORS), ("--quant", quant, QUANTS), ("--kv", kv, KVS)):
        if value not in known:
            raise BadOption(f"{option} {value!r} is not known; use {', '.join(known[:-1])} or {known[-1]}")
    choice = Choice(TORCH) if prefer == TORCH else _choice(source, blocks, device)
    if choice.name == TORCH and prefer == NATIVE:
        raise BadOption(f"the native executor cannot run {source.name} here ({choice.reason}); leave out --executor")
    if (quant == "int4" and device != "cpu") or (quant == "int8" and device not in ("cpu", "cuda")):
        raise BadOption(f"weights in {quant} cannot be computed with on {device}; leave out --quant")
    return choice


def warm_up(
    choice: Choice, source: ModelSource, blocks: BlockRange, *, dtype: str, device: str, quant: str = "none"
) -> None:
    """Bring the process to what it takes without any block: its libraries, and the code that they need to compute.

    Raises UnsupportedModel, CorruptModel.
    """
    if choice.name == TORCH:
        from bsns.model.stage import warm_up

        warm_up(source.path, blocks.start, dtype=dtype, device=device, quant=quant)


def load_executor(
    choice: Choice,
    source: ModelSource,
    blocks: BlockRange,
    *,
    dtype: str,
    device: str,
    threads: int,
    quant: str = "none",
    kv: str = "none",
) -> Executor:
    """Load the range. Raises what reading raises: CorruptModel, NotEnoughMemory, UnsupportedModel, BadRange."""
    if choice.name == NATIVE:
        weights, cache = (SAME if kept == "none" else kept for kept in (quant, kv))
        stage = NativeStage(source.checkpoint, blocks, dtype=dtype, weights=weights, cache=cache, threads=threads)
        return NativeExecutor(stage)
    # Here, because a node that computes natively needs none of the model library's layers.
    from bsns.model.stage import Stage
    from bsns.worker.torch_executor import TorchExecutor

    layers = Stage(source.path, blocks, dtype=dtype, device=device, quant=quant)
    return TorchExecutor(layers, dtype=dtype, kv=kv)


def _choice(source: ModelSource, blocks: BlockRange, device: str) -> Choice:
    if device != "cpu":
        return Choice(TORCH, f"device {device}")
    library = native_library()
    if isinstance(library, str):
        return Choice(TORCH, library)
    try:
        describe(source.checkpoint, read_config(source.path), blocks, library.padded_head)
    except NotNative as refusal:
        return Choice(TORCH, refusal.reason)
    return Choice(NATIVE)
