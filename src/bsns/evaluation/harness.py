"""lm-evaluation-harness over a swarm: its tasks and judgement, our scoring. Importing this needs the `eval` extra.

The library calls from a thread of its own; what it asks is done on the event loop of the swarm's client. Every request
goes into the journal, so that an interrupted task goes on where it was.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from bsns.client.generate import Generator
from bsns.client.sampling import SamplingOptions
from bsns.core.errors import BadOption, BsnsError
from bsns.evaluation.asks import Ask, Scorer, Text, windows
from bsns.evaluation.crew import each
from bsns.evaluation.journal import Journal
from bsns.evaluation.results import ItemResult, Metric, TaskResult, metric
from bsns.evaluation.runner import Told
from bsns.evaluation.scoring import again
from bsns.evaluation.tasks.task import Kind, best

JOURNAL = "lm_eval"
"""The task under which requests are journaled: the same request of two tasks is made once."""
ANSWER_TOKENS = 256
"""Of an answer for which a task says no length; the harness's own default."""

Request = tuple[Any, ...]
"""What the harness asks: (context, continuation), (text,) or (context, how to generate)."""


def check_names(names: Sequence[str]) -> None:
    """Raises BadOption for a task that the harness does not know."""
    known = set(TaskManager().all_tasks)
    for name in names:
        if name not in known:
            raise BadOption(
                f"neither we nor lm-evaluation-harness have a task {name!r}; lm-eval ls tasks lists its own"
            )


async def run_harness(
    name: str, lm: SwarmLM, limit: int | None, tasks: TaskManager | None = None
) -> dict[str, TaskResult]:
    """A task's results, or those of each task of a group. `lm` is of no use afterwards; `tasks` knows others than the
    harness's own. Raises BadOption where it cannot be run, for instance for want of its data, and what scoring raises.
    """

    def work() -> Mapping[str, Any]:
        found: Mapping[str, Any] = simple_evaluate(
            model=lm, tasks=[name], limit=limit, bootstrap_iters=0, log_samples=True, task_manager=tasks
        )
        return found

    try:
        found = await asyncio.to_thread(work)
    except BsnsError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise BadOption(f"lm-evaluation-harness cannot run {name}: {type(error).__name__}: {why}") from error
    finally:
        lm.stop()
    return {task: _result(found["results"][task], samples, lm) for task, samples in found["samples"].items()}


class SwarmLM(LM):  # type: ignore[misc]  # the harness brings no types
    """The harness's model: a swarm. Its methods are called from a thread that is not the event loop's."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        journal: Journal,
        *,
        prefix: int | None,
        at_once: int,
        told: Told = lambda done, all: None,
    ) -> None:
        """Made on the event loop that `generator` runs on."""
        super().__init__()
        self._generator = generator
        self._scorer = scorer
        self._journal = journal
        self._prefix = prefix
        self._at_once = at_once
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._running: concurrent.futures.Future[None] | None = None
        self._stopped = False

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability, and whether it is the likeliest."""
        found = self._all("loglikelihood", requests, self._score_pair)
        return [(item.logprobs[0], bool(item.values["greedy"])) for item in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each (text,): its log-probability, however long it is."""
        return [math.fsum(item.logprobs) for item in self._all("rolling", requests, self._score_text)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, how): what the model says, up to a text that ends it."""
        return [item.text for item in self._all("generate", requests, self._answer)]

    def made(self, sample: Mapping[str, Any]) -> list[ItemResult]:
        """What was found for the requests of one of the harness's samples."""
        keys = (_key(kind, args) for args in sample["arguments"] for kind in ("loglikelihood", "rolling", "generate"))
        return [found for key in keys if (found := self._journal.find(JOURNAL, key)) is not None]

    def stop(self) -> None:
        """Whatever it is asked from now on fails, and so does what it is doing."""
        self._stopped = True
        if self._running is not None:
            self._running.cancel()

    def _all(
        self, kind: str, requests: Sequence[Any], answer: Callable[[Request], Awaitable[ItemResult]]
    ) -> list[ItemResult]:
        if self._stopped:
            raise concurrent.futures.CancelledError
        wanted: dict[str, Request] = {_key(kind, request.args): request.args for request in requests}
        work = self._journaled(wanted, answer)
        self._running = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._running.result()
        found = (self._journal.find(JOURNAL, _key(kind, request.args)) for request in requests)
        return [item for item in found if item is not None]

    async def _journaled(
        self, wanted: Mapping[str, Request], answer: Callable[[Request], Awaitable[ItemResult]]
    ) -> None:
        left = [key for key in wanted if self._journal.find(JOURNAL, key) is None]
        done = len(wanted) - len(left)
        last_s = time.monotonic()

        async def ask(key: str) -> None:
            nonlocal done, last_s
            found = await answer(wanted[key])
            now_s = time.monotonic()
            seconds, last_s, done = now_s - last_s, now_s, done + 1
            self._journal.add(JOURNAL, _named(found, key, seconds))
            self._told(done, len(wanted))

        self._told(done, len(wanted))
        await each(left, ask, at_once=self._at_once)

    async def _score_pair(self, request: Request) -> ItemResult:
        context, continuation = request
        return await self._score([Text(context, continuation)])

    async def _score_text(self, request: Request) -> ItemResult:
        (text,) = request
        return await self._score(
            windows(self._generator.prompts.encode(text), self._prefix, self._generator.context_tokens)
        )

    async def _score(self, asks: Sequence[Ask]) -> ItemResult:
        scored = await self._scorer.score(asks)
        return ItemResult(
            item="",
            values={"greedy": float(all(score.greedy for score in scored.scores))},
            choices={},
            logprobs=tuple(score.logprob for score in scored.scores),
            tokens=scored.tokens,
            read_tokens=scored.read_tokens,
            seconds=0.0,
        )

    async def _answer(self, request: Request) -> ItemResult:
        context, how = request
        options = _options(how)
        room = max(1, self._generator.context_tokens - options.max_tokens)
        tokens = self._generator.prompts.encode(context)[-room:]
        text, made = await again(functools.partial(self._say, tokens, options))
        return ItemResult("", {}, {}, (), tokens=made, read_tokens=len(tokens) + made, seconds=0.0, text=text)

    async def _say(self, tokens: Sequence[int], options: SamplingOptions) -> tuple[str, int]:
        text, made = "", 0
        async with contextlib.aclosing(self._generator.stream(tokens, options)) as pieces:
            async for piece in pieces:
                text, made = text + piece.text, made + 1
        return text, made


def _options(how: Mapping[str, Any]) -> SamplingOptions:
    """The harness's words for how to generate, in ours; those that we do not have are left out."""
    until = how.get("until") or []
    drawn = bool(how.get("do_sample", False))
    return SamplingOptions(
        temperature=float(how.get("temperature", 1.0)) if drawn else 0.0,
        top_p=float(how.get("top_p", 1.0)) if drawn else 1.0,
        top_k=int(how.get("top_k", 0)) if drawn else 0,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_tokens=int(how.get("max_gen_toks", how.get("max_new_tokens", ANSWER_TOKENS))),
    )


def _key(kind: str, request: Sequence[Any]) -> str:
    words = json.dumps(list(request), sort_keys=True, default=str)
    return f"{kind}-{hashlib.blake2b(words.encode(), digest_size=12).hexdigest()}"


def _named(found: ItemResult, key: str, seconds: float) -> ItemResult:
    return ItemResult(
        key,
        found.values,
        found.choices,
        found.logprobs,
        found.tokens,
        found.read_tokens,
        round(seconds, 6),
        found.text,
    )


def _result(figures: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], lm: SwarmLM) -> TaskResult:
    """What the harness found of one task, in our words. It lists a question once for each of its filters."""
    by_item: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(f"{sample['doc_id']}-{str(sample.get('doc_hash', ''))[:8]}", []).append(sample)
    values = {item: _values(group) for item, group in by_item.items()}
    metrics: dict[str, Metric] = {}
    for name, figure in figures.items():
        words = name.split(",")
        if not isinstance(figure, int | float) or len(words) != 2 or words[0].endswith("_stderr"):
            continue
        own = words[0] if words[1] == "none" else name
        metrics[own] = _metric(float(figure), [found.get(own) for found in values.values()])
        if metrics[own].kind == "perplexity":  # it has log-probabilities where we have nats
            for found in values.values():
                found[own] = -found[own]
    items = tuple(_item(item, group[0], values[item], lm) for item, group in by_item.items())
    return TaskResult(
        n=len(items),
        metrics=metrics,
        seconds=round(math.fsum(item.seconds for item in items), 3),
        tokens=sum(item.tokens for item in items),
        read_tokens=sum(item.read_tokens for item in items),
        items=items,
    )


def _values(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, float] = {}
    for sample in group:
        kept = str(sample.get("filter", "none"))
        for name in sample.get("metrics", ()):
            if isinstance(value := sample[name], int | float):
                values[name if kept == "none" else f"{name},{kept}"] = float(value)
    return values


def _metric(figure: float, values: Sequence[float | None]) -> Metric:
    """A figure of the harness's, and how it comes from its items' values, if it does."""
    numbers = [value for value in values if value is not None]
    if len(numbers) == len(values) and numbers:
        kinds: tuple[tuple[Kind, list[float]], ...] = (
            ("accuracy" if set(numbers) <= {0.0, 1.0} else "mean", numbers),
            ("perplexity", [-number for number in numbers]),
        )
        for kind, signed in kinds:
            found = metric(kind, signed)
            if math.isclose(found.value, figure, rel_tol=1e-6, abs_tol=1e-12):
                return found
    return Metric("whole", figure, None)


def _item(item: str, sample: Mapping[str, Any], values: dict[str, float], lm: SwarmLM) -> ItemResult:
    made = lm.made(sample)
    logprobs = tuple(logprob for found in made for logprob in found.logprobs)
    chosen: dict[str, tuple[int, ...]] = {"acc": (best(logprobs),)} if "acc" in values and len(logprobs) > 1 else {}
    return ItemResult(
        item=item,
        values=values,
        choices=chosen,
        logprobs=logprobs,
        tokens=sum(found.tokens for found in made),
        read_tokens=sum(found.read_tokens for found in made),
        seconds=math.fsum(found.seconds for found in made),
        text=made[0].text if made else "",
    )
