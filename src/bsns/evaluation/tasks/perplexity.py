"""Perplexity of plain English: the windows of text that `bsns bench engine` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bsns.bench.engine import windows_of_text
from bsns.evaluation.asks import Encode, Score, Tokens
from bsns.evaluation.tasks.task import Item, Kind, Verdict


class Perplexity:
    """Every token of a window but its first is predicted; an item's value is the mean of its window, in nats."""

    metrics: Mapping[str, Kind] = {"perplexity": "perplexity"}

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        """See Task."""
        windows = map(tuple, windows_of_text(encode)[:limit])
        return [Item((Tokens(window[:1], window[1:]),)) for window in windows]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        """See Task."""
        (score,) = scores
        return Verdict(values={"perplexity": -score.logprob / len(score.likeliest)}, choices={})
