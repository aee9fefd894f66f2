"""`bsns serve`, `generate`, `chat` and `status` as separate processes that meet through an invite."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from processes import BLOCKS, Running, bsns, running, says, status, tiny, until
from running_time import running_s

from bsns.swarm.invites import parse_invite

__all__ = ["tiny"]


@pytest.fixture(scope="module")
def founder(tiny: str) -> Iterator[tuple[Running, str]]:
    """A node that founded a swarm and holds the first block, and its invite."""
    with running("serve", tiny, "--blocks", "0:1", "--threads", "1", "--json") as command:
        yield command, command.event("serving")["invite"]


@pytest.fixture(scope="module")
def last(tiny: str, founder: tuple[Running, str]) -> Iterator[tuple[Running, str]]:
    """A node that swarm with the last block, and its id."""
    with running("serve", tiny, "--blocks", "3:4", "--join", founder[1], "--threads", "1", "--json") as command:
        yield command, command.event("serving")["id"]


@pytest.fixture(scope="module")
def swarm(tiny: str, founder: tuple[Running, str], last: tuple[Running, str]) -> Iterator[tuple[dict[str, Any], str]]:
    """A third node that chose for itself, with room for 2 blocks, their caches and a journal of 3 million tokens."""
    room = ("--memory", "1784MB", "--cache-tokens", "3000000", "--threads", "1")
    with running("serve", tiny, "--blocks", "auto", *room, "--json", env={"BSNS_INVITE": founder[1]}) as command:
        yield command.event("serving"), founder[1]


def test_a_founder_alone_lacks_blocks(founder: tuple[Running, str]) -> None:
    ended = bsns("status", "--join", founder[1])
    assert ended.returncode == 0, ended
    assert f"nobody serves blocks 1:{BLOCKS}" in ended.stdout
    assert ended.stderr == ""


def test_auto_takes_what_the_swarm_lacks(swarm: tuple[dict[str, Any], str]) -> None:
    serving, invite = swarm
    assert serving["range"] == "1:3"
    (first, *_) = parse_invite(serving["invite"], time.time()).bootstrap
    assert first.endswith(serving["id"])  # others may join through it as well
    ended = bsns("status", "--join", invite, "--json")
    assert ended.returncode == 0, ended
    seen = json.loads(ended.stdout)
    assert seen["missing"] == {}
    assert [node["range"] for node in seen["nodes"]] == ["0:1", "1:3", "3:4"]
    assert all(node["error"] is None and node["round_trip_ms"] > 0 for node in seen["nodes"])


def test_generate_from_another_process(tiny: str, swarm: tuple[dict[str, Any], str]) -> None:
    ended = bsns(
        "generate", tiny, "--prompt", "-", "--max-tokens", "4", "--json", stdin="Hi", env={"BSNS_INVITE": swarm[1]}
    )
    assert ended.returncode == 0, ended
    assert json.loads(ended.stdout)["tokens"] == 4
    assert ended.stderr == ""


def test_chat_from_another_process(tiny: str, swarm: tuple[dict[str, Any], str]) -> None:
    ended = bsns("chat", tiny, "--max-tokens", "3", "--seed", "1", stdin="Hi\nand?\n", env={"BSNS_INVITE": swarm[1]})
    assert ended.returncode == 0, ended
    assert "> " not in ended.stdout
    assert ended.stderr == ""


def test_a_killed_client_frees_its_cache(tiny: str, swarm: tuple[dict[str, Any], str]) -> None:
    _, invite = swarm
    with running("generate", tiny, "--join", invite, "--prompt", "Hi", "--max-tokens", "30000") as client:
        assert client.text(20)
        busy = status(invite)["nodes"]
        assert all(node["sessions"] == 1 for node in busy)
        assert all(node["cache_tokens"] - node["cache_tokens_left"] >= 30000 for node in busy)
        client.signal(signal.SIGKILL)
        client.family.gone(5)
    until(lambda: all(node["sessions"] == 0 for node in status(invite)["nodes"]), 8, "the end of its sessions")
    assert all(node["cache_tokens_left"] == node["cache_tokens"] for node in status(invite)["nodes"])


def test_a_node_that_is_asked_to_leave_says_goodbye(
    swarm: tuple[dict[str, Any], str], last: tuple[Running, str]
) -> None:
    _, invite = swarm
    node, peer = last
    assert peer in [seen["id"] for seen in status(invite)["nodes"]]
    asked_s = running_s()
    node.signal(signal.SIGTERM)
    ended = node.finish(5)
    assert ended.returncode == 130, ended
    assert running_s() - asked_s < 3
    seen = status(invite)
    assert peer not in [node["id"] for node in seen["nodes"]]
    assert list(seen["missing"].values()) == [[f"3:{BLOCKS}"]]
    node.family.left_nothing()


def test_a_node_whose_daemon_dies_says_so_and_ends(tiny: str) -> None:
    """Nobody can reach it any more: it must not stay as if it served."""
    with running("serve", tiny, "--blocks", "0:1", "--threads", "1", "--json") as node:
        node.event("serving")
        (daemon,) = node.family.named("p2pd")
        daemon.kill()
        ended = node.finish(15)
        says(ended, "libp2p daemon", status=1)
        node.family.gone()


def test_a_founder_for_people_prints_an_invite_in_one_piece(tiny: str) -> None:
    narrow = {"COLUMNS": "40"}
    with running("serve", tiny, "--blocks", "0:1", "--threads", "1", "--public", env=narrow, anew=True) as command:
        assert "on this machine (see --host)" in command.line()
        words = command.line().split()
        assert words[:3] == ["bsns", "serve", tiny]
        assert parse_invite(words[-1], time.time()).open
        command.signal(signal.SIGINT)
        assert command.finish(5).returncode == 130
        command.family.left_nothing()


def test_prometheus_reads_a_node_while_it_answers(tiny: str) -> None:
    with running("serve", tiny, "--threads", "1", "--metrics", "127.0.0.1:0", "--json") as command:
        serving = command.event("serving")
        args = ("--prompt", "Hello", "--raw", "--max-tokens", "8", "--temperature", "1", "--json")
        assert bsns("generate", tiny, "--join", serving["invite"], *args).returncode == 0
        told = httpx.get(serving["metrics"], trust_env=False).text
        assert re.search(r'bsns_node_rows_total\{kind="decode"\} [1-9]', told), told
        assert f'peer="{serving["id"]}"' in told
        taken = bsns("serve", tiny, "--metrics", serving["metrics"].split("/")[2])
        assert (taken.returncode, taken.stdout) == (2, "")
        assert "give another --metrics" in taken.stderr
        assert bsns("serve", tiny, "--metrics", "everywhere").returncode == 2
