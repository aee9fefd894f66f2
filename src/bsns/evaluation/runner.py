"""The runner: takes a task to its end, many items at once, and keeps each as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bsns.evaluation.asks import Scorer
from bsns.evaluation.crew import each
from bsns.evaluation.journal import Journal
from bsns.evaluation.results import ItemResult, TaskResult, task_result
from bsns.evaluation.tasks.task import Item, Task

Told = Callable[[int, int], None]
"""Is told how many items of how many are done."""


async def run_task(
    name: str,
    task: Task,
    items: Sequence[Item],
    scorer: Scorer,
    journal: Journal,
    *,
    at_once: int,
    told: Told = lambda done, all: None,
) -> TaskResult:
    """Ask and judge every item that the journal lacks. Raises what the scorer raises; what is done stays done."""
    names = [item.name(number) for number, item in enumerate(items)]
    done = {item: found for item in names if (found := journal.find(name, item)) is not None}
    told(len(done), len(items))
    last_s = time.monotonic()

    async def ask(number: int) -> None:
        nonlocal last_s
        item = items[number]
        scored = await scorer.score(item.asks)
        verdict = task.judge(item, scored.scores)
        now_s = time.monotonic()
        found = ItemResult(
            item=names[number],
            values=dict(verdict.values),
            choices=dict(verdict.choices),
            logprobs=tuple(round(score.logprob, 6) for score in scored.scores),
            tokens=scored.tokens,
            read_tokens=scored.read_tokens,
            seconds=round(now_s - last_s, 6),
        )
        last_s = now_s
        done[found.item] = found
        journal.add(name, found)
        told(len(done), len(items))

    await each([number for number, item in enumerate(names) if item not in done], ask, at_once=at_once)
    return task_result(task.metrics, [done[item] for item in names])
