"""Perplexity of plain English: the windows of text that `bsns bench engine` takes."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping, Sequence

from bsns.bench.engine import WINDOW, WINDOWS
from bsns.core.errors import BadOption
from bsns.evaluation.asks import Encode, Score, Tokens
from bsns.evaluation.tasks.task import Item, Kind, Verdict


class Perplexity:
    """Every token of a window but its first is predicted; an item's value is the mean of its window, in nats."""

    metrics: Mapping[str, Kind] = {"perplexity": "perplexity"}

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        """See Task."""
        text = "\n".join(str(pydoc_data.topics.topics[name]) for name in sorted(pydoc_data.topics.topics))
        tokens = encode(text[: 6 * WINDOW * WINDOWS])
        if len(tokens) < WINDOW * WINDOWS:
            raise BadOption("this Python's documentation is too short to take a perplexity over; use another Python")
        windows = [tuple(tokens[start : start + WINDOW]) for start in range(0, WINDOW * WINDOWS, WINDOW)]
        return [Item((Tokens(window[:1], window[1:]),)) for window in windows[:limit]]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        """See Task."""
        (score,) = scores
        return Verdict(values={"perplexity": -score.logprob / len(score.likeliest)}, choices={})
