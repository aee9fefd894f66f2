"""`bsns up`: what it prints, and that nothing of it stays behind, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from inherited_signals import heeded_signals
from processes import BSNS, Family, bsns, environment, running, says, tiny, until

__all__ = ["tiny"]

LONG = ("--prompt", "Hi", "--max-tokens", "30000")


def test_json_is_one_object(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", "--prompt", "Hi", "--max-tokens", "5", "--json") as command:
        ended = command.finish(60)
        assert ended.returncode == 0, ended
        assert ended.stderr == ""
        answer = json.loads(ended.stdout)
        assert {"text", "tokens", "tokens_per_s", "ttft_ms", "nodes", "hops_ms"} <= answer.keys()
        assert answer["tokens"] == 5
        assert answer["tokens_per_s"] > 0
        assert [node["range"] for node in answer["nodes"]] == ["0:2", "2:4"]
        assert all({"id", "range", "device", "rss_mb"} <= node.keys() for node in answer["nodes"])
        assert [hop["node"] for hop in answer["hops_ms"]] == [node["id"] for node in answer["nodes"]]
        command.family.left_nothing()


def test_the_answer_alone_goes_to_standard_output(tiny: str) -> None:
    with running("up", tiny, "--nodes", "1", "--prompt", "Hi", "--max-tokens", "3", "--raw") as command:
        ended = command.finish(60)
        assert ended.returncode == 0, ended
        assert "serve" not in ended.stdout
        assert "┃" not in ended.stdout
        rows = [line.split("│")[2].strip() for line in ended.stderr.splitlines() if line.startswith("│")]
        assert rows == ["0:4"]
        assert "3 tokens (cut off at 3; see --max-tokens)" in ended.stderr
        command.family.left_nothing()


def test_metrics_of_each_node(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", "--metrics", "--json", env={"BSNS_LOG_FORMAT": "json"}) as command:
        urls = command.event("serving")["metrics"]
        told = [httpx.get(url, trust_env=False).text for url in urls]
        held = [re.search(r'bsns_node_range_blocks\{range="(.*?)",state="open"\} 2\.0', text) for text in told]
        assert [match[1] for match in held if match is not None] == ["0:2", "2:4"]
        command.signal(signal.SIGINT)
        command.finish(10)
        command.family.left_nothing()


def test_ctrl_c_in_the_middle_of_an_answer(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", *LONG) as command:
        assert command.text(20)
        command.signal(signal.SIGINT)
        command.signal(signal.SIGINT)  # a wrapper such as make passes it on, besides the terminal
        ended = command.finish(5)
        assert ended.returncode == 130, ended
        assert "Traceback" not in ended.stderr
        command.family.left_nothing()


def test_its_terminal_closed(tiny: str) -> None:
    with running("up", tiny, "--nodes", "1", "--json") as command:
        command.event("serving")
        command.signal(signal.SIGHUP)
        assert command.finish(5).returncode == 130
        command.family.left_nothing()


@pytest.mark.parametrize("after_s", [0.6, 1.5])
def test_a_signal_while_libraries_load(tiny: str, after_s: float) -> None:
    with running("up", tiny, "--nodes", "2", *LONG) as command:
        time.sleep(after_s)  # there is nothing to wait for: this is a moment, and any moment must do
        command.signal(signal.SIGINT)
        ended = command.finish(3)
        assert ended.returncode == 130, ended
        assert "Traceback" not in ended.stderr
        command.family.left_nothing()


def test_a_signal_while_nodes_start(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", *LONG) as command:
        until(lambda: len(command.family.look().named("serve")) == 2, 60, "two nodes")
        command.signal(signal.SIGTERM)
        ended = command.finish(5)
        assert ended.returncode == 130, ended
        command.family.left_nothing()


def test_killed_itself(tiny: str) -> None:
    with running("up", tiny, "--nodes", "1", *LONG) as command:
        assert command.text(20)
        assert len(command.family.look().living()) >= 4  # itself, a node, and a daemon for each
        command.signal(signal.SIGKILL)
        command.family.gone(5)


@pytest.mark.parametrize("moment", ["starting", "serving"])
def test_its_parent_killed(tiny: str, moment: str) -> None:
    script = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    arguments = [sys.executable, "-c", script, *BSNS, "up", tiny, "--nodes", "1", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with heeded_signals():
        parent = subprocess.Popen(arguments, **pipes, text=True, env=environment())
    family = Family(parent.pid)
    try:
        assert parent.stdout is not None
        if moment == "starting":
            until(lambda: family.look().named("zygote"), 30, "libraries that load")
        else:
            assert json.loads(parent.stdout.readline())["event"] == "serving"
        family.look()
        parent.kill()
        family.gone(5)
    finally:
        family.kill()
        parent.communicate()


def test_with_nohup_it_stays_when_its_parent_has_gone(tiny: str) -> None:
    script = "import signal, subprocess, sys; signal.signal(1, signal.SIG_IGN); subprocess.run(sys.argv[1:])"
    arguments = [sys.executable, "-c", script, *BSNS, "up", tiny, "--nodes", "1", "--json"]
    parent = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    family = Family(parent.pid)
    try:
        assert parent.stdout is not None
        invite = json.loads(parent.stdout.readline())["invite"]
        (command,) = (member for member in family.look().named("bsns.cli.main") if member.ppid() == parent.pid)
        parent.kill()
        parent.wait()
        for _ in range(2):  # it looks for its parent twice a second
            seen = bsns("status", "--join", invite, "--json")
            assert seen.returncode == 0, seen
        command.send_signal(signal.SIGTERM)
        family.gone(10)
    finally:
        family.kill()
        parent.communicate()


def test_a_node_killed_in_the_middle_of_an_answer(tiny: str) -> None:
    """It is started again, and the answer goes on."""
    words = ("up", tiny, "--nodes", "2", "--prompt", "Hi", "--max-tokens", "2000")
    with running(*words) as command:
        begun = command.text(20)
        command.family.look().named("2:4")[0].kill()
        ended = command.finish(60)
        command.family.gone(5)
    assert ended.returncode == 0, ended
    assert "node 2 was ended by SIGKILL" in ended.stderr
    assert "node 2 serves again" in ended.stderr
    assert begun + ended.stdout == bsns(*words).stdout


def test_a_node_killed_while_nobody_asks(tiny: str) -> None:
    with running("up", tiny, "--nodes", "1", "--json") as command:
        command.event("serving")
        command.family.look().named("0:4")[0].kill()
        for words in ("starting it again", "serves again"):
            told = command.event("node")["message"]
            assert words in told, told
        command.family.look().named("0:4")[0].kill()  # within a minute: starting it again does not help
        says(command.finish(10), "node 1 was ended by SIGKILL", "0:4", status=1)
        command.family.gone(5)


def test_a_node_killed_while_it_starts(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", *LONG) as command:
        until(lambda: command.family.look().named("2:4"), 60, "the second node")[0].kill()
        ended = command.finish(10)
        says(ended, "node 2 was ended by SIGKILL", "before it served", status=1)
        command.family.left_nothing()


def test_a_reader_that_leaves(tiny: str) -> None:
    """As in `bsns up … | head -1`."""
    read, write = os.pipe()
    process = subprocess.Popen(
        [*BSNS, "up", tiny, "--nodes", "1", *LONG], stdout=write, stderr=subprocess.PIPE, text=True, env=environment()
    )
    family = Family(process.pid)
    try:
        os.close(write)
        assert os.read(read, 1)
        os.close(read)
        family.look()
        _, stderr = process.communicate(timeout=8)
        assert "Traceback" not in stderr
        assert process.returncode != 0
        family.gone(5)
    finally:
        family.kill()
        process.communicate()


def test_chat_from_a_pipe(tiny: str) -> None:
    ended = bsns("up", tiny, "--nodes", "1", "--chat", "--max-tokens", "3", stdin="Hi\nand then?\n\n")
    assert ended.returncode == 0, ended
    assert "> " not in ended.stdout
    assert "error" not in ended.stderr


def test_families_see_children() -> None:
    """The witness for every test above: a family finds a child, and knows whether it lives."""
    family = Family(os.getpid())
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in [member.pid for member in family.look().living()]
    finally:
        child.kill()
        child.wait()
    assert child.pid not in [member.pid for member in family.living()]
