"""Rivals: turns, who is left out, and what is made of the figures; no rival is needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from bsns.bench.rivals import STREAMS, Contender, Race, Rate, race
from bsns.core.errors import BadOption, PeerFailed


class Track:
    """What happened to the contenders, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.happened: list[str] = []
        self.hanging = asyncio.Event()

    def contender(
        self, name: str, tps: float = 1.0, *, start: Exception | None = None, fails_in_turn: int = 0, hangs: str = ""
    ) -> Contender:
        turns = 0

        async def rate(streams: int) -> float:
            nonlocal turns
            turns += 1
            self.happened.append(f"{name} {streams}")
            if turns == fails_in_turn:
                raise PeerFailed(f"{name} fell")
            if hangs == "in its turn":
                self.hanging.set()
                await asyncio.Event().wait()
            return tps * streams

        @contextlib.asynccontextmanager
        async def entered() -> AsyncIterator[Rate]:
            if start is not None:
                raise start
            try:
                if hangs == "as it starts":
                    await asyncio.Event().wait()
                yield rate
            finally:
                self.happened.append(f"{name} ended")

        return entered

    async def run(self, rounds: int, **contenders: Contender) -> Race:
        return await race(contenders, rounds=rounds, told=self.told.append, start_deadline_s=0.2, round_deadline_s=0.2)


async def test_contenders_take_turns_and_all_of_them_are_ended() -> None:
    track = Track()
    found = await track.run(2, a=track.contender("a"), b=track.contender("b"))
    a_turn = ["a 1", "a 16", "b 1", "b 16"]
    assert track.happened == [*a_turn, *a_turn, "b ended", "a ended"]
    assert found.rates["b"] == {1: [1.0, 1.0], 16: [16.0, 16.0]}
    assert found.left_out == {}


async def test_who_is_not_there_is_left_out_with_the_reason_and_the_others_go_on() -> None:
    track = Track()
    found = await track.run(1, a=track.contender("a", start=BadOption("a is not installed")), b=track.contender("b"))
    assert found.left_out == {"a": "a is not installed"}
    assert list(found.rates) == ["b"]
    assert any("a is not installed" in line for line in track.told)


async def test_who_falls_is_ended_at_once_and_counts_as_far_as_it_went() -> None:
    track = Track()
    found = await track.run(3, a=track.contender("a", fails_in_turn=4), bsns_b=track.contender("b"))
    assert track.happened[:7] == ["a 1", "a 16", "b 1", "b 16", "a 1", "a 16", "a ended"]
    assert track.happened.count("a ended") == 1
    assert found.left_out == {"a": "in round 2: a fell"}
    assert found.rates["a"] == {1: [1.0], 16: [16.0]}
    assert found.report()["ratio"] == {"bsns_b": {"a": {"tps_1": 1.0, "tps_16": 1.0}}}


async def test_who_falls_in_the_first_round_is_left_out_of_all_figures() -> None:
    track = Track()
    found = await track.run(2, a=track.contender("a", fails_in_turn=2), b=track.contender("b"))
    assert track.happened == ["a 1", "a 16", "a ended", "b 1", "b 16", "b 1", "b 16", "b ended"]
    assert found.left_out == {"a": "a fell"}
    assert list(found.report()) == ["b", "ratio", "left_out", "rounds"]


@pytest.mark.parametrize("hangs", ["as it starts", "in its turn"])
async def test_who_hangs_is_left_out_in_time(hangs: str) -> None:
    track = Track()
    async with asyncio.timeout(5.0):
        found = await track.run(1, a=track.contender("a", hangs=hangs), b=track.contender("b"))
    assert "too long" in found.left_out["a"]
    assert track.happened.count("a ended") == 1
    assert list(found.rates) == ["b"]


async def test_no_round_is_begun_that_would_go_beyond_the_budget() -> None:
    track = Track()
    found = await race({"a": track.contender("a")}, rounds=9, told=print, budget_s=0.0)
    assert found.rounds == 1
    assert found.rates["a"] == {1: [1.0], 16: [16.0]}


async def test_all_are_ended_if_the_run_is_broken_off() -> None:
    track = Track()
    running = asyncio.create_task(
        race({"a": track.contender("a"), "b": track.contender("b", hangs="in its turn")}, rounds=1, told=print)
    )
    await track.hanging.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert track.happened[-2:] == ["b ended", "a ended"]


async def test_a_mistake_of_ours_is_not_taken_for_a_missing_rival() -> None:
    track = Track()
    with pytest.raises(ZeroDivisionError):
        await track.run(1, a=track.contender("a"), b=track.contender("b", start=ZeroDivisionError()))
    assert track.happened == ["a ended"]


def test_ratios_are_medians_of_each_round_and_of_ours_over_theirs() -> None:
    found = Race(
        {
            "bsns_int8": {n: [10.0 * n, 20.0 * n, 60.0 * n] for n in STREAMS},
            "bsns_bf16": {n: [5.0, 5.0, 5.0] for n in STREAMS},
            "llama_rpc": {1: [10.0, 5.0, 10.0], 16: [16.0, 16.0, 16.0]},
        },
        {"language_pipes": "not installed"},
    )
    report = found.report()
    assert report["bsns_int8"] == {"tps_1": 20.0, "tps_16": 320.0, "range_1": [10.0, 60.0], "range_16": [160.0, 960.0]}
    assert report["ratio"]["bsns_int8"] == {"llama_rpc": {"tps_1": 4.0, "tps_16": 20.0}}
    assert report["ratio"]["bsns_bf16"]["llama_rpc"]["tps_1"] == 0.5
    assert report["left_out"] == {"language_pipes": "not installed"}
