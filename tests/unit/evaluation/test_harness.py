"""lm-evaluation-harness over our scoring. Needs the `eval` extra."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bsns.client.pieces import Piece
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BadOption, PeerLost
from bsns.evaluation import scoring
from bsns.evaluation.journal import Journal
from bsns.evaluation.scoring import SwarmScorer

pytest.importorskip("lm_eval")

from bsns.evaluation.harness import SwarmLM, check_names, run_harness


class Generator:
    """Letters are tokens, and each is followed by the next of the alphabet. Fails once it has read `enough` texts."""

    context_tokens = 8

    def __init__(self, enough: int = 1000) -> None:
        self.prompts = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])
        self.enough = enough
        self.texts: list[str] = []

    async def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]:
        self.texts.append("".join(map(chr, tokens)))
        if len(self.texts) > self.enough:
            raise PeerLost("gone")
        yield torch.nn.functional.one_hot((torch.tensor(tokens[start:]) + 1) % 128, 128).float() * 100

    async def stream(self, tokens: Sequence[int], options: SamplingOptions) -> AsyncIterator[Piece]:
        token = tokens[-1]
        for number in range(options.max_tokens):
            token += 1
            last = number == options.max_tokens - 1 or chr(token) in options.stop
            yield Piece("" if chr(token) in options.stop else chr(token), token, "stop" if last else None)
            if last:
                return


def model(generator: Generator, journal: Journal) -> SwarmLM:
    stub: Any = generator
    scorer = SwarmScorer(stub, generator.prompts.encode, prefix=0)
    return SwarmLM(stub, scorer, journal, prefix=0, at_once=2)


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=request) for request in requests]


async def test_loglikelihoods() -> None:
    with Journal(None, "s") as journal:
        lm = model(Generator(), journal)
        found = await asyncio.to_thread(lm.loglikelihood, asked(("abc", "de"), ("abc", "dx"), ("abc", "de")))
    assert [greedy for _, greedy in found] == [True, False, True]
    assert [logprob for logprob, _ in found] == pytest.approx([0.0, -100.0, 0.0], abs=1e-4)


async def test_a_long_text_is_read_in_windows() -> None:
    generator = Generator()
    with Journal(None, "s") as journal:
        (found,) = await asyncio.to_thread(model(generator, journal).loglikelihood_rolling, asked(("abcdefghijk",)))
    assert found == pytest.approx(-100.0, abs=1e-3)  # what follows the prefix is a wrong guess
    assert sorted(generator.texts) == ["\0abcdefg", "cdefghij"]


async def test_answers() -> None:
    how = {"until": ["e"], "max_gen_toks": 5}
    requests = asked(("ab", how), ("xa", {**how, "until": "z"}), ("an endless context", {**how, "do_sample": False}))
    with Journal(None, "s") as journal:
        found = await asyncio.to_thread(model(Generator(), journal).generate_until, requests)
    assert found == ["cd", "bcdef", "uvwxy"]


async def test_requests_that_are_done_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AGAIN_S", 0.0)
    requests = asked(*((letter, "x") for letter in "abcdef"))
    with Journal(tmp_path / "a", "s") as journal, pytest.raises(PeerLost):
        await asyncio.to_thread(model(Generator(enough=3), journal).loglikelihood, requests)
    generator = Generator()
    with Journal(tmp_path / "a", "s") as journal:
        assert len(journal) == 3
        assert len(await asyncio.to_thread(model(generator, journal).loglikelihood, requests)) == 6
    assert len(generator.texts) == 3


async def test_whoever_is_stopped_answers_no_more() -> None:
    with Journal(None, "s") as journal:
        lm = model(Generator(), journal)
        lm.stop()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.to_thread(lm.loglikelihood, asked(("a", "b")))


def test_a_task_that_nobody_has() -> None:
    with pytest.raises(BadOption, match="no_such_task"):
        check_names(["no_such_task"])


async def test_a_whole_task(tmp_path: Path) -> None:
    import json

    from lm_eval.tasks import TaskManager

    rows = [{"q": "ab", "choices": ["cd", "xy"], "right": 0}, {"q": "mn", "choices": ["ab", "op"], "right": 0}]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "laid.yaml").write_text(f"""
task: laid_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    with Journal(None, "s") as journal:
        lm = model(Generator(), journal)
        manager = TaskManager(include_path=str(tmp_path))
        found = (await run_harness("laid_letters", lm, None, manager))["laid_letters"]
    assert found.n == 2
    assert (found.metrics["acc"].kind, found.metrics["acc"].value) == ("accuracy", 0.5)
    assert found.metrics["acc"].stderr == pytest.approx(0.5)
    assert [item.choices["acc"] for item in found.items] == [(0,), (1,)]
    assert found.tokens == 8
    assert all(math.isfinite(item.seconds) for item in found.items)


async def test_a_task_whose_data_are_missing_is_one_line(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    (tmp_path / "none.yaml").write_text(f"""
task: laid_nothing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "none.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
""")
    with Journal(None, "s") as journal:
        lm = model(Generator(), journal)
        with pytest.raises(BadOption, match="cannot run laid_nothing"):
            await run_harness("laid_nothing", lm, None, TaskManager(include_path=str(tmp_path)))
