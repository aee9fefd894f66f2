"""What options let through is what the parts behind them know."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from bsns.cli import console, routing_options
from bsns.node import executors, wires


@pytest.mark.parametrize(
    ("option", "known"),
    [
        (routing_options.Wire, wires.WIRES),
        (console.QuantOption, executors.QUANTS),
        (console.KvOption, executors.KVS),
        (console.ExecutorOption, executors.EXECUTORS),
    ],
    ids=["wire", "quant", "kv", "executor"],
)
def test_choices_are_those_there_are(option: Any, known: tuple[str, ...]) -> None:
    literal, *_ = get_args(option)
    assert sorted(get_args(literal)) == sorted(known)
