"""Virtual time: nobody waits, and machines take as long as they have cores for."""

from __future__ import annotations

import asyncio
import time

import pytest

from bsns.simulator.clock import Machine, OwnClock, Stalled, VirtualLoop, run


def test_time_passes_only_while_everybody_waits() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        moments = [loop.now_s()]
        await asyncio.sleep(3600)
        moments.append(loop.now_s())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(86_400):
                await loop.create_future()
        return [*moments, loop.now_s()]

    began_s = time.perf_counter()
    assert run(main) == pytest.approx([0.0, 3600.0, 90_000.0])
    assert time.perf_counter() - began_s < 60


def test_whoever_waits_for_nothing_is_found_out() -> None:
    async def main(loop: VirtualLoop) -> None:
        await loop.create_future()

    with pytest.raises(Stalled):
        run(main)


@pytest.mark.parametrize(("cores", "ends"), [(1, [3.0, 5.0, 6.0]), (2, [1.5, 2.5, 3.5]), (3, [1.0, 2.0, 3.0])])
def test_jobs_share_a_machines_cores(cores: int, ends: list[float]) -> None:
    async def main(loop: VirtualLoop) -> tuple[list[float], float]:
        machine, ended = Machine(loop, cores), []

        async def job(seconds: float) -> None:
            await asyncio.to_thread(loop.spend, machine, seconds)
            ended.append(loop.time())

        await asyncio.gather(*(job(seconds) for seconds in (1.0, 2.0, 3.0)))
        return ended, machine.busy_s

    ended, busy_s = run(main)
    assert busy_s == pytest.approx(6.0)
    if cores != 2:
        assert ended == pytest.approx(ends)
    else:  # three at two thirds until the first is done, then each has a core
        assert ended == pytest.approx([1.5, 2.5, 3.5])


def test_what_a_job_raises_reaches_who_waits_for_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        def fail() -> None:
            loop.spend(Machine(loop), 1.0)
            raise ValueError("on purpose")

        with pytest.raises(ValueError, match="on purpose"):
            await asyncio.to_thread(fail)
        assert loop.time() == pytest.approx(1.0)

    run(main)


def test_a_machines_time_of_day_may_be_wrong_and_time_passes_all_the_same() -> None:
    async def main(loop: VirtualLoop) -> None:
        clock = OwnClock(loop)
        began_s = clock.unix_s()
        clock.ahead_s = -3600.0
        await asyncio.sleep(10)
        assert clock.now_s() == loop.now_s() == pytest.approx(10.0)
        assert clock.unix_s() == pytest.approx(began_s - 3590.0)

    run(main)
