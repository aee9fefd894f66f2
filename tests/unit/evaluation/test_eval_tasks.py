"""Our own tasks on small data of their kind, found in packages that tests lay down."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bsns.bench import engine
from bsns.core.errors import BadOption
from bsns.evaluation.asks import Score, Text, Tokens
from bsns.evaluation.datafile import DataFile
from bsns.evaluation.tasks import hellaswag, lambada
from bsns.evaluation.tasks.bigbench import BigBench
from bsns.evaluation.tasks.hellaswag import HellaSwag
from bsns.evaluation.tasks.lambada import Lambada
from bsns.evaluation.tasks.perplexity import Perplexity

Lay = Callable[[DataFile, bytes], DataFile]


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Puts a data file where its package would have it, in a package that must not be imported."""

    def lay(data: DataFile, content: bytes) -> DataFile:
        file = tmp_path / data.module / data.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        (tmp_path / data.module / "__init__.py").write_text("raise RuntimeError('nobody may import me')")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return replace(data, sha256=hashlib.sha256(content).hexdigest())

    return lay


def no_tokens(text: str) -> list[int]:
    raise AssertionError("this task has no use for tokens")


def score(logprob: float, *likeliest: int, greedy: bool = False) -> Score:
    return Score(logprob, likeliest, greedy)


def test_hellaswag(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    row: dict[str, Any] = {
        "activity_label": "Roof shingle removal",
        "ctx_a": "[header] How to remove  a roof [title] Begin.",
        "ctx_b": "he STARTS",
        "endings": ["falls [title] Ends", "goes", "sings [substeps] aloud", "stops"],
        "label": "1",
    }
    monkeypatch.setattr(hellaswag, "DATA", lay(replace(hellaswag.DATA, module="laid_olmo"), b"any"))
    monkeypatch.setattr(hellaswag, "_rows", lambda content, limit: [row, row][:limit])
    task = HellaSwag()
    (item,) = task.items(1, no_tokens)
    context = "Roof shingle removal: How to remove a roof. Begin. He starts"
    endings = ["falls. Ends", "goes", "sings aloud", "stops"]
    assert [ask.continuation for ask in item.asks if isinstance(ask, Text)] == [f" {ending}" for ending in endings]
    assert {ask.context for ask in item.asks} == {context}
    assert item.lengths == tuple(map(len, endings))
    # the shortest is the likeliest, the longest the likeliest per letter
    verdict = task.judge(item, [score(-11.0), score(-6.0), score(-11.0), score(-20.0)])
    assert verdict.values == {"acc": 1.0, "acc_norm": 0.0}
    assert verdict.choices == {"acc": (1,), "acc_norm": (0,)}


def test_hellaswags_file(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"activity_label": ["A"] * 3, "label": ["0", "1", "2"]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert [row["label"] for row in hellaswag._rows(sink.getvalue().to_pybytes(), 2)] == ["0", "1"]


def test_lambada(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("the sea is", " blue"), ("and the sky is,", " too")]
    lines = [json.dumps({"request": {"context": context, "continuation": word}}) for context, word in pairs]
    content = gzip.compress("\n".join(lines).encode())
    monkeypatch.setattr(lambada, "DATA", lay(replace(lambada.DATA, module="laid_olmo"), content))
    task = Lambada()
    items = task.items(None, no_tokens)
    assert [item.asks for item in items] == [(Text("the sea is", " blue"),), (Text("and the sky is,", " too"),)]
    verdict = task.judge(items[0], [score(-1.5, 4, 5, greedy=True)])
    assert (verdict.values, verdict.choices) == ({"acc": 1.0, "perplexity": 1.5}, {"acc": (4, 5)})


def test_bigbench(lay: Lay) -> None:
    example = {"input": "Did he?", "target_scores": {"Yes": 0, "No": 1}}
    plain = lay(
        DataFile("laid_bench", "plain.json", "x", ""), json.dumps({"name": "t", "examples": [example]}).encode()
    )
    own = {
        "task_prefix": "Think.",
        "example_input_prefix": " In: ",
        "example_output_prefix": " Out:",
        "append_choices_to_input": False,
    }
    special = lay(DataFile("laid_bench", "own.json", "x", ""), json.dumps({**own, "examples": [example] * 2}).encode())
    task = BigBench(plain)
    (item,) = task.items(5, no_tokens)
    context = "\nQ: Did he?\n  choice: Yes\n  choice: No\nA: "
    assert item.asks == (Text(context, "Yes"), Text(context, "No"))
    assert [ask.context for ask in BigBench(special).items(1, no_tokens)[0].asks] == ["Think. In: Did he? Out:"] * 2
    assert task.judge(item, [score(-3), score(-2)]).values == {"acc": 1.0}
    assert task.judge(item, [score(-2), score(-2)]).choices == {"acc": (0,)}


def test_a_question_with_two_right_choices_is_told(lay: Lay) -> None:
    example = {"input": "?", "target_scores": {"a": 1, "b": 1}}
    data = lay(DataFile("laid_two", "t.json", "x", ""), json.dumps({"name": "t", "examples": [example]}).encode())
    with pytest.raises(BadOption, match="2 right choices"):
        BigBench(data).items(None, no_tokens)


def test_perplexity_is_over_the_windows_of_the_engines_benchmark() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text[::3]]

    expected = engine.windows_of_text(encode)
    task = Perplexity()
    items = task.items(None, encode)
    asks = [ask for item in items for ask in item.asks if isinstance(ask, Tokens)]
    assert [[*ask.context, *ask.continuation] for ask in asks] == expected
    assert {len(ask.context) for ask in asks} == {1}
    assert len(task.items(3, encode)) == 3
    verdict = task.judge(items[0], [score(-511 * math.log(8), *range(511))])
    assert verdict.values["perplexity"] == pytest.approx(math.log(8))
    with pytest.raises(BadOption, match="too short"):
        task.items(None, lambda text: [1])


def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it() -> None:
    missing = DataFile("no_such_package", "x.json", "pip install --no-deps nothing==1", "")
    for read in (missing.read, lambda: BigBench(missing).items(None, no_tokens)):
        with pytest.raises(BadOption, match=r"run: pip install --no-deps nothing==1"):
            read()
    inside = DataFile("no_such_package.inside", "x.json", "nothing==1", "")
    assert inside.find() is None


def test_another_file_in_its_place_is_refused(lay: Lay) -> None:
    data = lay(DataFile("laid_other", "x.json", "pip install other==1", ""), b"as it was")
    assert data.read() == b"as it was"
    with pytest.raises(BadOption, match="pip install other==1"):
        replace(data, sha256="0" * 64).read()


def test_an_items_name_says_what_was_asked() -> None:
    from bsns.evaluation.tasks.task import Item

    item = Item((Text("a", " b"),))
    assert item.name(3) == Item((Text("a", " b"),)).name(3)
    assert len({item.name(3), item.name(4), Item((Text("a", " c"),)).name(3), replace(item, right=1).name(3)}) == 4
