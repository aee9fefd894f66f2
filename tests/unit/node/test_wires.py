"""Which codec a way gets: what was asked for, or by how fast the way has been measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bsns.core.errors import BadOption
from bsns.core.ids import PeerId
from bsns.node import wires as module
from bsns.node.wires import SHORT, WIRES, Wires
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.records import LinkRecord
from bsns.transport.clock import MACHINE_CLOCK

A, B = PeerId("a"), PeerId("b")
MBIT = 1e6 / 8


class Seen:
    """A view that knows what it was given."""

    def __init__(self, ways: dict[tuple[str, str], float], round_trips_s: dict[str, float]) -> None:
        self.ways, self.round_trips_s = ways, round_trips_s

    def bytes_per_s(self, sender: str, receiver: str) -> float | None:
        return self.ways.get((sender, receiver))

    def round_trip_s(self, peer: str) -> float | None:
        return self.round_trips_s.get(peer)


class Measured:
    def __init__(self, ways: dict[str, float]) -> None:
        self.ways = ways

    def links(self) -> list[LinkRecord]:
        return [LinkRecord(PeerId(peer), 0.01, 0.0, bytes_per_s, 0.0) for peer, bytes_per_s in self.ways.items()]


def wires(
    wire: str = "auto",
    ways: dict[tuple[str, str], float] | None = None,
    round_trips_s: dict[str, float] | None = None,
    measured: dict[str, float] | None = None,
    dtype: str = "bfloat16",
) -> Wires:
    seen: Any = Seen(ways or {}, round_trips_s or {})
    made = Wires(wire, seen, PeerId("own"), None, MACHINE_CLOCK, dtype=dtype, columns=576)  # type: ignore[arg-type]
    made._prober = Measured(measured or {})  # type: ignore[assignment]
    return made


@pytest.fixture(autouse=True)
def cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 µs a row: at 576 numbers worth it below some 150 Mbit/s."""
    monkeypatch.setattr(module, "row_cost_s", lambda codec, dtype, columns: 30e-6)


@pytest.mark.parametrize(("mbit", "codec"), [(10, SHORT), (100, SHORT), (1000, RAW), (math.inf, RAW)])
def test_auto_goes_by_the_ways_speed_in_its_direction(mbit: float, codec: str) -> None:
    chosen = wires(ways={("a", "b"): mbit * MBIT, ("b", "a"): math.inf})
    assert chosen.choose(A, B) == codec
    assert chosen.choose(B, A) == RAW


def test_auto_leaves_alone_what_nobody_has_measured() -> None:
    assert wires().choose(A, B) == RAW
    assert wires().choose(None, A) == RAW


def test_our_own_way_to_a_node_that_is_far_is_slow_until_it_is_measured() -> None:
    assert wires(round_trips_s={"a": 0.05}).choose(None, A) == SHORT
    assert wires(round_trips_s={"a": 0.05}).choose(A, None) == SHORT
    assert wires(round_trips_s={"a": 0.0005}).choose(None, A) == RAW
    assert wires(round_trips_s={"a": 0.05}, measured={"a": math.inf}).choose(None, A) == SHORT
    assert wires(round_trips_s={"a": 0.05}, measured={"a": 1e9}).choose(None, A) == RAW
    assert wires(round_trips_s={"a": 0.0005}, measured={"a": 1e6}).choose(None, A) == SHORT


def test_auto_keeps_float32_exact() -> None:
    assert wires(ways={("a", "b"): 1.0}, dtype="float32").choose(A, B) == RAW
    assert wires("int8", dtype="float32").choose(A, B) == "int8"
    assert wires("bf16", dtype="float32").choose(A, B) == "bf16"


def test_what_was_asked_for_is_taken_on_every_way() -> None:
    for wire in WIRES[1:]:
        codec = RAW if wire in ("none", "bf16") else wire  # of bfloat16, bf16 is what it is
        assert codec in CODECS
        assert wires(wire).choose(A, B) == wires(wire).choose(None, A) == codec


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(BadOption, match="no wire codec 'zip'; use one of auto, none, bf16"):
        wires("zip")


def test_the_cost_of_a_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < module.row_cost_s("int8", "bfloat16", 64) < 0.1
