"""Virtual time: nobody waits, and machines take as long as they have cores for."""

from __future__ import annotations

import asyncio
import time

import pytest

from bsns.simulator.clock import Machine, OwnClock, Process, Stalled, VirtualLoop, run


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


@pytest.mark.parametrize(("cores", "ends"), [(1, [1.0, 3.0, 6.0]), (2, [1.0, 2.0, 4.0]), (3, [1.0, 2.0, 3.0])])
def test_processes_take_turns_on_a_machines_cores(cores: int, ends: list[float]) -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        machine = Machine(loop, cores)
        processes, ended = [Process(machine) for _ in range(3)], []

        async def job(process: Process, seconds: float) -> None:
            await asyncio.to_thread(loop.spend, process, seconds)
            assert process.busy_s == seconds
            ended.append(loop.time())

        await asyncio.gather(*map(job, processes, (1.0, 2.0, 3.0)))
        return ended

    assert run(main) == pytest.approx(ends)


def test_a_process_does_one_thing_at_a_time() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        process, ended = Process(Machine(loop, 2)), []

        async def job(seconds: float) -> None:
            await asyncio.to_thread(loop.spend, process, seconds)
            ended.append(loop.time())

        await asyncio.gather(job(1.0), job(2.0))
        return ended

    assert run(main) == pytest.approx([1.0, 3.0])


def test_a_process_hears_nothing_while_it_waits_for_a_core_and_then_everything_before_it_computes() -> None:
    async def main(loop: VirtualLoop) -> list[tuple[str, float]]:
        machine, seen = Machine(loop), []
        busy, other = Process(machine), Process(machine)
        busy.run(1.0, lambda: seen.append(("computed", loop.time())))
        loop.call_later(0.2, other.hear, lambda: other.run(0.5, lambda: seen.append(("answered", loop.time()))))
        loop.call_later(0.7, other.hear, lambda: seen.append(("heard", loop.time())))
        loop.call_later(1.2, other.hear, lambda: seen.append(("heard late", loop.time())))
        await asyncio.sleep(3.0)
        return [(what, round(at_s, 6)) for what, at_s in seen]

    assert run(main) == [("computed", 1.0), ("heard", 1.0), ("answered", 1.5), ("heard late", 1.5)]


def test_what_a_job_raises_reaches_who_waits_for_it() -> None:
    async def main(loop: VirtualLoop) -> None:
        def fail() -> None:
            loop.spend(Process(Machine(loop)), 1.0)
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
