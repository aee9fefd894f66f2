"""`bsns eval` at the command line, over a client whose logits are made here."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bsns.cli import eval as verb
from bsns.cli.main import app
from bsns.core.errors import PeerLost
from bsns.evaluation import scoring
from bsns.evaluation.asks import Tokens
from bsns.evaluation.registry import TASKS
from bsns.evaluation.tasks.task import Item


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "250", "TERM": "dumb"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


class Generator:
    """Says that token t is followed by t + 1; breaks for good after `enough` texts."""

    context_tokens = 64
    prompts = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=0, eos_token_id=0), encode=lambda text: [1])

    def __init__(self, enough: int) -> None:
        self.enough = enough
        self.texts = 0

    async def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]:
        if self.texts >= self.enough:
            raise PeerLost("node x is gone")
        self.texts += 1
        yield torch.nn.functional.one_hot((torch.tensor(tokens[start:]) + 1) % 16, 16).float()


class Client:
    """What the verb needs of a client."""

    def __init__(self, enough: int = 1000) -> None:
        self.generator = Generator(enough)
        self.source = SimpleNamespace(name="tiny", model_id="m")
        self.view = SimpleNamespace(records=self.records)
        self.closed = False

    async def records(self) -> list[Any]:
        return [SimpleNamespace(state="serving", dtype="float32", executor="torch: because")] * 3

    async def close(self) -> None:
        self.closed = True


Use = Callable[[Client], Path]


@pytest.fixture
def use(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes the verb use this client, and ask seven questions of which five are answered rightly; gives a model."""
    items = [Item((Tokens((1, 5), (6,)), Tokens((1, 5), (9, 9))), right=int(number > 4)) for number in range(7)]
    monkeypatch.setattr(verb, "_items", lambda source, names, limit: dict.fromkeys(names, items[:limit]))
    monkeypatch.setattr(scoring, "AGAIN_S", 0.0)

    def use(client: Client) -> Path:
        async def join(*_: Any) -> Client:
            return client

        monkeypatch.setattr(verb, "_join", join)
        return tiny_model("llama")

    return use


def test_figures(use: Use) -> None:
    client = Client()
    model = use(client)
    code, printed, complained = run(str(model), "--tasks", "causal_judgement", "--swarm", "invite", "--json")
    assert (code, complained) == (0, "")
    figures = json.loads(printed)
    assert figures["nodes"] == 3
    assert figures["settings"]["executor"] == "torch"
    task = figures["tasks"]["causal_judgement"]
    assert task["n"] == 7
    assert task["metrics"]["acc"]["value"] == pytest.approx(5 / 7)
    assert task["metrics"]["acc"]["stderr"] == pytest.approx((5 / 7 * 2 / 7 / 6) ** 0.5)
    assert task["tokens"] == 21
    assert client.closed
    code, printed, _ = run(str(model), "--limit", "3", "--swarm", "invite", "--tasks", "causal_judgement")
    assert code == 0
    assert "100.00 %" in printed


def test_an_interrupted_run_says_how_to_go_on_and_does(use: Use, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    model = use(Client(enough=4))
    words = (str(model), "--tasks", "disambiguation_qa", "--swarm", "invite", "--sessions", "1")
    code, _, complained = run(*words, "--output", str(output))
    assert code == 1
    assert "node x is gone" in complained
    assert "4 answers kept in" in complained
    assert "goes on from there" in complained
    again = Client()
    use(again)
    code, printed, _ = run(*words, "--output", str(output), "--json")
    assert code == 0
    assert again.generator.texts == 3
    assert json.loads(printed)["tasks"]["disambiguation_qa"]["n"] == 7
    assert len(json.loads(output.read_bytes())["tasks"]["disambiguation_qa"]["items"]) == 7
    assert not output.with_name("a.json.partial").exists()
    use(Client(enough=4))
    assert "4 answers lost" in run(*words)[2]


def test_two_runs_side_by_side(use: Use, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    model = use(Client())
    words = (str(model), "--tasks", "causal_judgement, disambiguation_qa", "--swarm", "invite")
    assert run(*words, "--output", str(a))[0] == 0
    assert run(*words, "--limit", "6", "--wire", "int8", "--output", str(b))[0] == 0
    code, printed, _ = run("compare", str(a), str(b), "--json")
    assert code == 0
    figures = json.loads(printed)
    assert (figures["a"]["wire"], figures["b"]["wire"]) == ("auto", "int8")
    task = figures["tasks"]["causal_judgement"]
    assert (task["n"], task["left_out"]) == (6, 1)
    assert task["metrics"]["acc"]["agreement"] == 1.0
    assert (task["metrics"]["acc"]["both"], task["metrics"]["acc"]["neither"]) == (5, 1)
    code, printed, _ = run("compare", str(a), str(b))
    assert code == 0
    assert "5 · 0 · 0 · 1" in printed


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"tasks": 1}')
    for words, said in (
        ((str(broken), str(broken)), "broken.json is no result of bsns eval"),
        ((str(tmp_path / "none.json"), str(broken)), "none.json cannot be read"),
    ):
        code, _, complained = run("compare", *words)
        assert code == 2
        assert said in complained


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    for module in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "bsns.evaluation.harness", raising=False)
    monkeypatch.setattr(verb, "_items", lambda source, names, limit: {})
    model = str(tiny_model("llama"))
    for words, said in (
        (("--tasks", "arc_easy"), "pip install 'bsns[eval]'"),
        (("--tasks", " , "), "no task is named"),
        (("--tasks", "lambada", "--limit", "0"), "--limit"),
        ((), "--tasks"),
        (("--tasks", "lambada", "--swarm", "x", "--quant", "int8"), "local swarm"),
        (("--tasks", "lambada", "--wire", "int9"), "int9"),
        (("--tasks", "causal_judgement", "--nodes", "99"), "too few for 99 nodes"),
    ):
        code, _, complained = run(model, *words)
        assert code == 2, complained
        assert said in complained
        assert "Traceback" not in complained


def test_help_and_every_task_that_it_names() -> None:
    said = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert said.exit_code == 0
    assert "Example:" in said.output
    assert "compare" in said.output
    said = CliRunner().invoke(app, ["eval", "run", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    for name in TASKS:
        assert name in said.output
