"""Multiple choice in BIG-bench's form (Srivastava et al. 2022): a JSON file with questions and the choices' scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bsns.core.errors import BadOption
from bsns.evaluation.asks import Encode, Score, Text
from bsns.evaluation.datafile import DataFile
from bsns.evaluation.tasks.task import Item, Kind, Verdict, best


class BigBench:
    """Takes the choice with the greatest log-probability; `acc` is the share of those that the file scores with 1."""

    metrics: Mapping[str, Kind] = {"acc": "accuracy"}

    def __init__(self, data: DataFile) -> None:
        self._data = data

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        """See Task."""
        task = json.loads(self._data.read())
        return [_item(task, example) for example in task["examples"][:limit]]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        """See Task."""
        choice = best([score.logprob for score in scores])
        return Verdict(values={"acc": float(choice == item.right)}, choices={"acc": (choice,)})


def _item(task: Mapping[str, Any], example: Mapping[str, Any]) -> Item:
    # The words between the parts are BIG-bench's own where a task does not bring others (its docs/doc.md). It lists
    # the choices in an order drawn by chance, we in the file's.
    targets: Mapping[str, float] = example["target_scores"]
    listed = "".join(f"{task.get('choice_prefix', chr(10) + '  choice: ')}{choice}" for choice in targets)
    context = (
        task.get("task_prefix", "")
        + task.get("example_input_prefix", "\nQ: ")
        + example["input"]
        + (listed if task.get("append_choices_to_input", True) else "")
        + task.get("example_output_prefix", "\nA: ")
    )
    rights = [number for number, score in enumerate(targets.values()) if score == 1]
    if len(rights) != 1:
        raise BadOption(f"a question of {task['name']} has {len(rights)} right choices; only tasks with one can be run")
    return Item(asks=tuple(Text(context, choice) for choice in targets), right=rights[0])
