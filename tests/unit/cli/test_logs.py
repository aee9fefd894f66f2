"""Log lines: as JSON for programs, and with the ids of what they are about."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from memory_swarm import MemorySwarm, StageShelf, until
from scripted_engine import ScriptedEngine, chat, client_of
from tiny_models import prompt

from bsns.cli.logs import log_to_stderr
from bsns.client.pieces import Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import SamplingOptions
from bsns.core.ids import PeerId
from bsns.gateway.grammar import Grammars
from bsns.model.source import resolve

CUTS = (0, 2, 5)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    structlog.reset_defaults()  # another test may have called a verb, which tells warnings alone
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_of_ours_and_of_libraries(capfd: pytest.CaptureFixture[str]) -> None:
    log_to_stderr(logging.INFO, "json")
    try:
        raise ValueError("no")
    except ValueError:
        structlog.get_logger("bsns").exception("it failed", session="7")
    logging.getLogger("library").warning("it is %s", "odd")
    ours, theirs = map(json.loads, capfd.readouterr().err.splitlines())
    assert (ours["event"], ours["level"], ours["session"]) == ("it failed", "error", "7")
    assert ours["exception"].endswith("ValueError: no")
    assert (theirs["event"], theirs["level"]) == ("it is odd", "warning")
    assert theirs["timestamp"].endswith("Z")


def test_the_environment_asks_for_it_too(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNS_LOG_FORMAT", "json")
    log_to_stderr()
    structlog.get_logger("bsns").info("not told")
    structlog.get_logger("bsns").warning("told")
    assert json.loads(capfd.readouterr().err)["event"] == "told"


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(False, "", False), (True, "", True), (True, "1", False)]
)
def test_colours_are_for_terminals_that_want_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str, coloured: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    log_to_stderr()
    structlog.get_logger("bsns").warning("told", session="7")
    assert ("\x1b[" in capsys.readouterr().err) == coloured


async def test_a_gateways_line_names_its_request_and_its_sessions(capfd: pytest.CaptureFixture[str]) -> None:
    prompts = Prompts(resolve("smollm2-135m").path)
    engine = ScriptedEngine(prompts)
    log_to_stderr(logging.INFO, "json")
    async with client_of(engine, Grammars(prompts.tokenizer, engine.vocab_size)) as http:
        for stream in (False, True):
            body = chat(n=2, stream=stream)
            assert (await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "r-1"})).content
        await http.get("/health", headers={"x-request-id": "r-2"})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    whole, streamed, health = (line for line in lines if line["event"] == "request")
    assert (whole["request_id"], sorted(whole["sessions"])) == ("r-1", ["1", "2"])
    assert (streamed["request_id"], sorted(streamed["sessions"])) == ("r-1", ["3", "4"])
    assert (health["request_id"], "sessions" in health) == ("r-2", False)


async def test_nodes_and_repairs_name_the_session(
    swarm: MemorySwarm, shelf: StageShelf, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model("llama")
    stages = shelf.stages(path, CUTS)
    await swarm.add_stages([*stages, stages[1]], block_count=CUTS[-1])
    client = swarm.client(shelf.ends(path), route=tuple(swarm.nodes[f"node-{n}"].hop for n in range(2)))
    async for _ in client.stream(prompt(3), SamplingOptions(max_tokens=2)):  # its tasks open the links
        pass
    stats = Stats()
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        with structlog.contextvars.bound_contextvars(request_id="r-3"):
            stream = client.stream(prompt(20), SamplingOptions(max_tokens=30), stats)
            await anext(stream)
        swarm.network.kill(PeerId("node-1"))
        async for _ in stream:
            pass
        await until(lambda: not len(swarm.nodes["node-0"].worker.sessions))
    events = {line["event"]: line for line in lines if line.get("session") == stats.session}
    assert {"opened a session", "a session failed", "a lost stage was replaced", "a session has ended"} <= set(events)
    assert events["a lost stage was replaced"]["request_id"] == "r-3"
    assert events["opened a session"]["client"] == "client-0"
