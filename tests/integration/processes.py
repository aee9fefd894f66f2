"""The `bsns` command as tests run it: processes that cannot outlive a test, a tiny model, a swarm to share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import pytest
from inherited_signals import heeded_signals

from bsns.model.source import resolve
from bsns.node import zygote
from bsns.node.processes import FORKS

BSNS = (sys.executable, "-m", "bsns.cli.main")
BLOCKS = 4
CONTEXT = 32768
T = TypeVar("T")


def until(look: Callable[[], T], deadline_s: float, what: str) -> T:
    """The first truthy value of `look`, polled; fails after `deadline_s`."""
    give_up_s = time.monotonic() + deadline_s
    while not (value := look()):
        if time.monotonic() > give_up_s:
            pytest.fail(f"{what} did not come about within {deadline_s:g} s")
        time.sleep(0.05)
    return value


class Family:
    """A process with all it has ever started, as far as a test looked: whoever is alive, and the sockets they made."""

    def __init__(self, pid: int) -> None:
        self._known: dict[int, psutil.Process] = {}
        self.sockets: set[Path] = set()
        self._root = psutil.Process(pid)
        self.look()

    def look(self) -> Family:
        with contextlib.suppress(psutil.Error):
            for member in [self._root, *self._root.children(recursive=True)]:
                self._known.setdefault(member.pid, member)
        for member in self._known.values():
            with contextlib.suppress(psutil.Error):
                for at in re.findall(r"/tmp/bsns-[\w-]+\.sock", " ".join(member.cmdline())):
                    self.sockets.add(Path(at))
        return self

    def living(self) -> list[psutil.Process]:
        return [member for member in self._known.values() if _lives(member)]

    def named(self, word: str) -> list[psutil.Process]:
        """Living members with `word` in their command line."""
        found = []
        for member in self.living():
            with contextlib.suppress(psutil.Error):
                if any(word in part for part in member.cmdline()):
                    found.append(member)
        return found

    def gone(self, deadline_s: float = 5.0) -> None:
        until(lambda: not self.living(), deadline_s, f"the end of {self.living()}")

    def left_nothing(self) -> None:
        """After an orderly end: no process, and no socket."""
        self.gone()
        assert [at for at in self.sockets if at.exists()] == []

    def kill(self) -> None:
        self.look()
        for member in self.living():
            with contextlib.suppress(psutil.Error):
                member.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Forked:
    """What is used of a subprocess.Popen with text pipes, of a command forked where the libraries are loaded."""

    def __init__(self, arguments: Sequence[str], env: dict[str, str]) -> None:
        pipes = [os.pipe() for _ in range(3)]
        theirs = pipes[0][0], pipes[1][1], pipes[2][1]
        try:
            self._forked = zygote.Forked.begun(zygote.zygote().ask(arguments, env, theirs))
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self.args = ["bsns", *arguments]
        self.pid = self._forked.pid
        self.stdin: IO[str] | None = os.fdopen(pipes[0][1], "w")
        self.stdout, self.stderr = os.fdopen(pipes[1][0]), os.fdopen(pipes[2][0])

    @property
    def returncode(self) -> int | None:
        return self._forked.wait(0.0)

    def send_signal(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._forked.send_signal(signum)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All it still says, and its end."""
        give_up_s = None if timeout is None else time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError, ValueError):
            if self.stdin is not None:
                self.stdin.close()
        said: dict[IO[str], str] = {}
        readers = [
            threading.Thread(target=lambda at=at: said.__setitem__(at, at.read()), daemon=True)
            for at in (self.stdout, self.stderr)
            if not at.closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if give_up_s is None else max(0.0, give_up_s - time.monotonic()))
        left_s = None if give_up_s is None else max(0.0, give_up_s - time.monotonic())
        if any(reader.is_alive() for reader in readers) or self._forked.wait(left_s) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.stdout.close()
        self.stderr.close()
        return said.get(self.stdout, ""), said.get(self.stderr, "")


class Running:
    """A `bsns` command that runs beside the test: on Linux forked, unless it is to begin `anew`."""

    def __init__(
        self, *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None, anew: bool = False
    ) -> None:
        env = environment() | (env or {})
        self._process: Forked | subprocess.Popen[str]
        with heeded_signals():
            if FORKS and not anew:
                self._process = Forked(arguments, env)
            else:
                pipe = subprocess.PIPE
                command = [*BSNS, *arguments]
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        self.pid = self._process.pid
        self.family = Family(self.pid)
        if stdin is not None:
            assert self._process.stdin is not None
            self._process.stdin.write(stdin)
            self._process.stdin.close()
            self._process.stdin = None

    def event(self, name: str, deadline_s: float = 60.0) -> dict[str, Any]:
        """The next JSON line of standard output that is this event."""
        assert self._process.stdout is not None
        give_up_s = time.monotonic() + deadline_s
        while time.monotonic() < give_up_s:
            line = self._process.stdout.readline()
            if not line:
                pytest.fail(f"it ended before {name}: {self.finish()}")
            value: dict[str, Any] = json.loads(line)
            self.family.look()
            if value.get("event") == name:
                return value
            assert value.get("event") != "error", value
        pytest.fail(f"no {name} within {deadline_s:g} s")

    def line(self) -> str:
        """The next line of standard output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def text(self, length: int) -> str:
        """The next characters of standard output."""
        assert self._process.stdout is not None
        return self._process.stdout.read(length)

    def signal(self, signum: signal.Signals) -> None:
        self.family.look()
        self._process.send_signal(signum)

    def finish(self, deadline_s: float = 10.0) -> subprocess.CompletedProcess[str]:
        """Its end, which has to come in time."""
        self.family.look()
        try:
            stdout, stderr = self._process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"it did not end within {deadline_s:g} s")
        return subprocess.CompletedProcess(self._process.args, self._process.returncode, stdout, stderr)

    def kill(self) -> None:
        self.family.kill()
        self._process.communicate()


@contextlib.contextmanager
def running(
    *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None, anew: bool = False
) -> Iterator[Running]:
    """A command and all its processes, ended with the block."""
    command = Running(*arguments, stdin=stdin, env=env, anew=anew)
    try:
        yield command
    finally:
        command.kill()


def bsns(*arguments: str, stdin: str = "", deadline_s: float = 60.0, env: dict[str, str] | None = None) -> Any:
    """A command run to its end; returns its CompletedProcess."""
    with running(*arguments, stdin=stdin, env=env) as command:
        return command.finish(deadline_s)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "BSNS_INVITE": "", "NO_COLOR": "1"}


def says(ended: subprocess.CompletedProcess[str], *words: str, status: int | None = None) -> None:
    """Asserts a refusal as a person wants it: one line on standard error with these words, and a status."""
    assert ended.returncode not in (0, None), ended
    if status is not None:
        assert ended.returncode == status, ended
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: "), ended.stderr
    assert "Traceback" not in ended.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{lines[0]!r} lacks {missing}"


def tiny_model(directory: Path) -> Path:
    """A random Llama of 4 blocks with SmolLM2's tokenizer, which never says that it is done. 13 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    own = resolve("smollm2-135m").path
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=json.loads((own / "config.json").read_text())["vocab_size"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:3] = 0.0  # a logit of 0 never wins against 49,000 random ones
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (own / name).is_file():
            shutil.copy(own / name, directory / name)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny model."""
    return str(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def swarm(tiny: str) -> Iterator[tuple[Running, str]]:
    """Two nodes that serve the tiny model, as `bsns up` starts them, and their invite."""
    with running("up", tiny, "--nodes", "2", "--json") as command:
        yield command, command.event("serving")["invite"]


def status(invite: str) -> dict[str, Any]:
    """What `bsns status --json` prints, asked from this process, which has the libraries loaded."""
    from bsns.cli.status import as_dict, missing
    from bsns.cli.up import in_block_order
    from bsns.node.observe import observe

    nodes = in_block_order(asyncio.run(observe(invite)))
    return {"nodes": [as_dict(node) for node in nodes], "missing": missing(nodes)}
