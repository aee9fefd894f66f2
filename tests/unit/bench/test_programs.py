"""Others' programs: waited for, and ended whatever happens; shell scripts stand for them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import tomllib
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest

from bsns.bench.language_pipes import VARIABLE, find_language_pipes, toml
from bsns.bench.llama_cpp import Absent, Decode, LlamaCpp
from bsns.bench.llama_rpc import rpc_server, rpc_servers, tokens_per_s
from bsns.bench.programs import Program, free_port, listens, running
from bsns.core.errors import BadOption

LISTENING = """
import socket, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with socket.create_server((words["-H"], int(words["-p"]))) as server:
    while True:
        server.accept()[0].close()
"""
FIGURES = json.dumps({"pl": 16, "speed_tg": 50.0, "pp": 120, "tg": 16})


def program(path: Path, script: str, interpreter: str = "/bin/sh") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{script}")
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def ended(pids: Collection[int]) -> bool:
    """Whether all of them have, in some seconds."""
    for _ in range(500):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.01)
    return False


async def has_said(started: Program) -> bool:
    return started.said.endswith("\n")


@needs_proc
async def test_a_program_and_what_it_started_end_with_the_context(tmp_path: Path) -> None:
    script = program(tmp_path / "p", "trap '' TERM\nsleep 100 &\necho $!\nwait\nsleep 100\n")
    async with running([str(script)], os.environ, tmp_path / "log") as started:
        await started.until(partial(has_said, started), 5.0)
        pids = started.process.pid, int(started.said)
        assert all(map(alive, pids))
    assert await asyncio.to_thread(ended, pids)


async def _never() -> bool:
    return False


async def test_a_program_that_ends_or_does_not_come_up_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    script = program(tmp_path / "p", "echo first\necho no such model\nexit 3\n")
    async with running([str(script)], os.environ, tmp_path / "log") as started:
        with pytest.raises(BadOption, match="p ended with status 3: no such model"):
            await started.until(_never, 5.0)
    script = program(tmp_path / "q", "echo loading\nsleep 100\n")
    async with running([str(script)], os.environ, tmp_path / "log") as started:
        await started.until(partial(has_said, started), 5.0)
        with pytest.raises(BadOption, match=r"q was not ready within 0.3 s: loading"):
            await started.until(_never, 0.3)
        with pytest.raises(BadOption, match=r"q did not end within 0.1 s: loading"):
            await started.output(0.1)


async def test_output_is_apart_from_errors_where_asked(tmp_path: Path) -> None:
    script = program(tmp_path / "p", "echo figures\necho chatter >&2\n")
    async with running([str(script)], os.environ, tmp_path / "log", errors=tmp_path / "errors") as started:
        assert await started.output(5.0) == "figures\n"
    script = program(tmp_path / "p", "echo figures\necho out of memory >&2\nexit 1\n")
    async with running([str(script)], os.environ, tmp_path / "log", errors=tmp_path / "errors") as started:
        with pytest.raises(BadOption, match="out of memory"):
            await started.output(5.0)


async def test_rpc_servers_listen_on_ports_of_their_own_until_the_context_is_left(tmp_path: Path) -> None:
    llama = LlamaCpp(tmp_path, "1", ())
    missing = rpc_server(llama)
    assert isinstance(missing, Absent)
    assert "GGML_RPC=ON" in missing.reason
    server = program(tmp_path / "ggml-rpc-server", LISTENING, sys.executable)
    assert rpc_server(llama) == server
    async with rpc_servers(server, 2, threads=1, scratch=tmp_path) as servers:
        ports = [int(where.rpartition(":")[2]) for where in servers]
        assert len(set(ports)) == 2
        assert all([await listens(port) for port in ports])
    assert not any([await listens(port) for port in ports])


async def test_speeds_over_rpc_are_read_and_what_fails_is_an_error(tmp_path: Path) -> None:
    llama = LlamaCpp(tmp_path, "1", ())
    program(tmp_path / "llama-batched-bench", f"echo \"$*\" > {tmp_path}/words\necho '{FIGURES}'\n")
    ask = partial(tokens_per_s, llama, Path("m.gguf"), Decode(16), threads=1, scratch=tmp_path, deadline_s=5.0)
    assert await ask(servers=("127.0.0.1:1", "127.0.0.1:2")) == 50.0
    words = (tmp_path / "words").read_text()
    assert "--rpc 127.0.0.1:1,127.0.0.1:2 -ngl 99 -ts 1,1" in words
    assert await ask() == 50.0
    assert "--rpc" not in (tmp_path / "words").read_text()
    program(tmp_path / "llama-batched-bench", "true\n")
    with pytest.raises(BadOption, match="no figures"):
        await ask()
    program(tmp_path / "llama-batched-bench", "sleep 100\n")
    with pytest.raises(BadOption, match="did not end"):
        await tokens_per_s(llama, Path("m"), Decode(1), threads=1, scratch=tmp_path, deadline_s=0.2)


async def test_language_pipes_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    found = await find_language_pipes(tmp_path)
    assert isinstance(found, Absent)
    assert VARIABLE in found.reason
    monkeypatch.setenv(VARIABLE, str(tmp_path / "venv"))
    found = await find_language_pipes(tmp_path)
    assert isinstance(found, Absent)
    assert "language-pipes==2.5.0" in found.reason
    program(tmp_path / "venv" / "bin" / "language-pipes", "echo 2.5.0\n")
    found = await find_language_pipes(tmp_path)
    assert not isinstance(found, Absent)
    assert found.version == "2.5.0"
    program(tmp_path / "venv" / "bin" / "language-pipes", "echo no torch >&2\nexit 1\n")
    with pytest.raises(BadOption, match="no torch"):
        await find_language_pipes(tmp_path)


def test_configurations_are_toml() -> None:
    values = {"a": 1, "b": "x", "c": ["k"], "d": [{"e": 0.5}, {"e": 2, "f": "y"}]}
    assert tomllib.loads(toml(values)) == values


async def test_a_port_is_free_until_somebody_listens() -> None:
    port = free_port()
    assert not await listens(port)
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", port)
    assert await listens(port)
    server.close()
