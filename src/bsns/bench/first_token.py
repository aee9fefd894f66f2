"""The first token of a long prompt over slow ways, in every codec: a part of `bsns bench compress`.

All nodes are processes of this machine, and share its cores: SmolLM2's thirty blocks take them longer than ways of 100
Mbit/s do, whatever travels. Of its first three blocks, one for each node, the ways are a greater part; what is left on
ways of 10 Gbit/s is not theirs.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bsns.bench.emulation import Network, Way
from bsns.bench.faults import homes
from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.model.source import SMOLLM2, ModelSource, cache_dir, resolve
from bsns.node.client import Client
from bsns.node.local import Home, LocalSwarm
from bsns.planning.joining import equal_split

DTYPE = "bfloat16"
STAGES = 3
CLIENT = 0
DELAY_S = 0.0025
PROMPT_TOKENS = 2048
WIRES = ("none", "int8", "int8-dyn", "int8-rot", "int4")


async def bench_first_token(quick: bool, told: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds to the first token, and how many times less than with plain activations; of all blocks and few."""
    whole = resolve(SMOLLM2)
    few = first_blocks(whole, STAGES, cache_dir() / "bench")
    figures: dict[str, Any] = {}
    for name, source, bits_per_s in (
        ("ttft_100mbit", whole, 100e6),
        ("ttft_100mbit_few_blocks", few, 100e6),
        ("ttft_30mbit_few_blocks", few, 30e6),
        ("ttft_10gbit_few_blocks", few, 10e9),
    ):
        medians = await _medians(source, bits_per_s / 8, 1 if quick else 5, told)
        figures[name] = medians
        figures[f"{name}_ratio"] = {wire: round(medians["none"] / ms, 2) for wire, ms in medians.items()}
    return figures


async def _medians(
    source: ModelSource, bytes_per_s: float, rounds: int, told: Callable[[str], None]
) -> dict[str, float]:
    """Over three nodes whose ways take 5 ms there and back; codecs in turns, after a round that does not count."""
    taken: dict[str, list[float]] = {wire: [] for wire in WIRES}
    told(f"ttft: starting {STAGES} nodes for {source.block_count} blocks in an emulated network")
    with Network(STAGES + 1) as network, network.entered(CLIENT):
        network.shape(
            {(a, b): Way(DELAY_S, bytes_per_s) for a in range(STAGES + 1) for b in range(STAGES + 1) if a != b}
        )
        async with AsyncExitStack() as stack:
            swarm = LocalSwarm(
                str(source.path),
                equal_split(source.block_count, STAGES),
                dtype=DTYPE,
                homes=homes(network, STAGES),
                own_home=Home(network.address(CLIENT)),
            )
            await stack.enter_async_context(swarm)
            clients = {
                wire: await stack.enter_async_context(
                    Client.on(swarm.peer, source, dtype=DTYPE, wire=wire, keep_sessions=0)
                )
                for wire in WIRES
            }
            prompt = (clients["none"].tokens("The sea is wide, and the ship is small. " * 300))[:PROMPT_TOKENS]
            for number in range(1 + rounds):
                told(f"ttft: round {number}")
                for wire, client in clients.items():
                    stats = Stats()
                    async for _ in client.generator.stream(prompt, SamplingOptions(max_tokens=2), stats):
                        pass
                    if number:
                        taken[wire].append(stats.ttft_ms)
    return {wire: round(statistics.median(times), 1) for wire, times in taken.items()}


def first_blocks(source: ModelSource, count: int, scratch: Path) -> ModelSource:
    """A model of the first blocks of another, with its ends; written the first time."""
    path = scratch / f"{source.name}-first-{count}"
    if not (path / "config.json").is_file():
        path.mkdir(parents=True, exist_ok=True)
        kept = {name for name, entry in source.checkpoint.tensors.items() if entry.block is None or entry.block < count}
        files = {entry.file for entry in source.checkpoint.tensors.values()}
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items() if name in kept}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        for file in source.path.iterdir():
            kinds = (".json", ".jinja", ".txt", ".model")
            if file.suffix in kinds and ".safetensors" not in file.name and file.name != "config.json":
                shutil.copy(file, path)
        # last: where it is, everything is
        config = json.loads((source.path / "config.json").read_text()) | {"num_hidden_layers": count}
        (path / "config.json").write_text(json.dumps(config))
    return resolve(str(path))
