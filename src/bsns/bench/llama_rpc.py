"""llama.cpp over the network: one `ggml-rpc-server` for each part of a model, each a process of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

from bsns.bench.llama_cpp import Absent, LlamaCpp, Measure, arguments, best_tuning, environment, speed
from bsns.bench.programs import free_port, listens, running
from bsns.core.errors import BadOption

_NAMES = ("ggml-rpc-server", "rpc-server")
"""What llama.cpp calls it, and did."""
_START_DEADLINE_S = 20.0
# Seen: llama-batched-bench may end before its figures are written (llama_cpp.py).
_ATTEMPTS = 3


def rpc_server(llama: LlamaCpp) -> Path | Absent:
    """The program in the same build."""
    for name in _NAMES:
        if os.access(llama.directory / name, os.X_OK):
            return llama.directory / name
    return Absent(
        f"{llama.directory} holds no {_NAMES[0]}: build llama.cpp with -DGGML_RPC=ON, as docs/benchmarks.md says"
    )


@contextlib.asynccontextmanager
async def rpc_servers(program: Path, count: int, *, threads: int, scratch: Path) -> AsyncIterator[tuple[str, ...]]:
    """So many servers, and where they listen (host:port). Raises BadOption."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for number in range(count):
            port = free_port()
            command = [str(program), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)]
            log = scratch / f"rpc-server-{port}-{number}.log"
            server = await stack.enter_async_context(running(command, environment(os.environ), log))
            await server.until(partial(listens, port), _START_DEADLINE_S)
            found.append(f"127.0.0.1:{port}")
        yield tuple(found)


async def tokens_per_s(
    llama: LlamaCpp,
    file: Path,
    measure: Measure,
    *,
    threads: int,
    scratch: Path,
    deadline_s: float,
    servers: Sequence[str] = (),
) -> float:
    """As `llama_cpp.tokens_per_s`, in a process that is ended with the caller. Raises BadOption."""
    program, *options = arguments(measure, file, threads, best_tuning(measure), servers)
    command = [str(llama.directory / program), *options]
    log, errors = scratch / f"{program}.out", scratch / f"{program}.err"
    for _ in range(_ATTEMPTS):
        async with running(command, environment(os.environ), log, errors=errors) as running_:
            said = await running_.output(deadline_s)
        if said.strip():
            return speed(measure, said)
    raise BadOption(f"llama.cpp in {llama.directory} wrote no figures, {_ATTEMPTS} times over; use another build")
