"""What options let through is what the parts behind them know."""

from __future__ import annotations

import math
import sys
from typing import Any, get_args

import pytest
import typer

from bsns.cli import console, gateway, main, routing_options
from bsns.core.errors import BadOption
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


@pytest.mark.parametrize("value", ["inf", "1e400", "3000000", "nan"])
@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("gateway", "m", "--join", "x"), "--stalled-s"),
        (("gateway", "m", "--join", "x"), "--drain-s"),
        (("gateway", "m", "--join", "x"), "--deadline-s"),
        (("serve", "m"), "--lease-s"),
        (("bench", "soak"), "--minutes"),
    ],
)
def test_times_have_bounds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    option: str,
    value: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bsns", *words, f"{option}={value}"])
    assert main.command() == console.EXIT_USER
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_nan_is_no_number() -> None:
    """Whatever the bounds of an option let through."""
    assert console.a_number(2.5) == 2.5
    with pytest.raises(typer.BadParameter, match="not a number"):
        console.a_number(math.nan)


def test_an_empty_host_is_no_address() -> None:
    with pytest.raises(BadOption, match="--host is empty"):
        gateway.open_listener("", 0)
