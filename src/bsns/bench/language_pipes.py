"""language-pipes, where it is installed: two nodes of it on this machine, and the OpenAI API that they serve.

Its first node holds the embedding, the head and the first half of the blocks, and takes the requests. It decides by
memory how many blocks a node loads: each is given half a block more than its share. It listens on every address of the
machine, whatever one says; requests need a key, which is drawn for each run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bsns.bench.llama_cpp import Absent
from bsns.bench.programs import Program, free_port, running
from bsns.bench.timed import Api, offered
from bsns.core.blocks import BlockRange
from bsns.model.source import ModelSource
from bsns.planning.joining import equal_split

VARIABLE = "BSNS_LANGUAGE_PIPES"
"""Names the virtual environment that it is installed in."""
PACKAGE = "language-pipes==2.5.0"
MODEL = "bsns/model"
_START_DEADLINE_S = 180.0
_ASK_DEADLINE_S = 30.0
_LOADED = "successfully loaded on"
"""What a node says when it has its blocks; 2.5.0."""
_MOST_JOBS = 64
_FIRST_BLOCK = "model.layers.0."
# What in the caller's environment would change how it runs.
_MEDDLING = ("LP_", "OMP_", "KMP_", "GOMP_", "MKL_", "PYTHONPATH", "HF_")


@dataclass(frozen=True, slots=True)
class LanguagePipes:
    """Its program, and its version as it says it."""

    program: Path
    version: str


async def find_language_pipes(scratch: Path) -> LanguagePipes | Absent:
    """What `$BSNS_LANGUAGE_PIPES` names. Raises BadOption if it does not run."""
    program = _program()
    if isinstance(program, Absent):
        return program
    async with running([str(program), "--version"], _environment(os.environ), scratch / "version.log") as asked:
        said = await asked.output(_ASK_DEADLINE_S)
    return LanguagePipes(program, said.strip()[-40:])


def _program() -> Path | Absent:
    named = os.environ.get(VARIABLE, "")
    if not named:
        return Absent(f"set {VARIABLE} to a virtual environment with {PACKAGE}, as docs/benchmarks.md says")
    program = (Path(named).expanduser() / "bin" / "language-pipes").absolute()
    if not os.access(program, os.X_OK):
        return Absent(f"{named} holds no bin/language-pipes: install {PACKAGE} there, or correct {VARIABLE}")
    return program


@contextlib.asynccontextmanager
async def two_nodes(
    found: LanguagePipes, source: ModelSource, models: Path, *, threads: int, scratch: Path
) -> AsyncIterator[Api]:
    """Two nodes with half of the blocks each, and the API. `models`: a folder where it finds the model, and keeps what
    it makes out about it. Raises BadOption if they do not come up.
    """
    link_model(source.path, models / MODEL / "data")
    key = secrets.token_hex(16)
    ports = free_port(), free_port(), free_port()
    async with contextlib.AsyncExitStack() as stack:
        for number, blocks in enumerate(equal_split(source.block_count, 2)):
            home = scratch / f"node-{number}"
            home.mkdir(exist_ok=True)
            config = home / "config.toml"
            config.write_text(toml(configuration(number, source, blocks, ports, key)))
            own = {"LP_APP_DIR": str(home), "LP_MODEL_DIR": str(models), "HF_HUB_OFFLINE": "1", "HOME": str(home)}
            environment = {**_environment(os.environ), **own, "OMP_NUM_THREADS": str(threads)}
            command = [str(found.program), "-c", str(config), "run"]
            node = await stack.enter_async_context(running(command, environment, scratch / f"node-{number}.log"))
            await node.until(partial(_loaded, node), _START_DEADLINE_S)
        api = Api(f"http://127.0.0.1:{ports[2]}/v1", key, MODEL)
        await node.until(partial(offered, api), _START_DEADLINE_S)
        yield api


def link_model(model: Path, data: Path) -> None:
    """Where it looks for models: a folder of its own, since it writes beside what it reads."""
    data.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = data / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())


def configuration(
    number: int, source: ModelSource, blocks: BlockRange, ports: tuple[int, int, int], key: str
) -> dict[str, Any]:
    """Of the first node or the second; `ports`: theirs, and the API's."""
    tensors = source.checkpoint.tensors.items()
    block_bytes = 2 * sum(math.prod(entry.shape) for name, entry in tensors if name.startswith(_FIRST_BLOCK))
    names = "first", "second"
    layers = {"model_id": MODEL, "device": "cpu", "memory": (len(blocks) + 0.5) * block_bytes / 2**30, "data_type": 16}
    node: dict[str, Any] = {
        "node_id": names[number],
        "network_ip": "127.0.0.1",
        "peer_port": ports[number],
        "max_node_jobs": _MOST_JOBS,
        "layer_models": [layers],
    }
    if number:
        return {**node, "bootstrap_nodes": [{"address": "127.0.0.1", "port": ports[0]}]}
    ends = {"model_id": MODEL, "num_local_layers": 0, "device": "cpu"}
    return {**node, "job_port": ports[2], "api_keys": [key], "max_api_jobs": _MOST_JOBS, "end_models": [ends]}


def toml(values: Mapping[str, Any]) -> str:
    """Numbers, texts, lists of texts and lists of tables of them."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not _tables(value)]
    for name, value in values.items():
        for table in value if _tables(value) else ():
            plain += [f"[[{name}]]", toml(table)]
    return "\n".join(plain) + "\n"


def _tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


async def _loaded(node: Program) -> bool:
    return _LOADED in await asyncio.to_thread(lambda: node.said)


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in inherited.items() if not name.startswith(_MEDDLING)}
