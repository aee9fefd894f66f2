"""Whatever arrives in whatever order, batches lose nothing but what is overwritten, repeat nothing and keep every
session's order."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Part
from bsns.worker.batching import ACTIVE_S, SHORT_ROWS, Batcher, Work
from bsns.worker.sessions import Session

MAX_ROWS = 64
RANGES = [BlockRange(0, 4), BlockRange(1, 3)]

adds = st.tuples(st.just("add"), st.integers(0, 5), st.sampled_from([1, 2, SHORT_ROWS, SHORT_ROWS + 1, 40, 64, 100]))
agains = st.tuples(st.just("again"), st.integers(0, 5), st.sampled_from([1, 3, 50, 1000]))
takes = st.tuples(st.just("take"), st.just(0), st.just(0))
drops = st.tuples(st.just("drop"), st.integers(0, 5), st.just(0))
events = st.lists(st.one_of(adds, adds, adds, agains, takes, takes, drops), max_size=60)
stages_at_once = st.lists(st.integers(1, 4), min_size=6, max_size=6)


@given(events=events, stages_at_once=stages_at_once, tick_s=st.sampled_from([0.0, 0.01, 0.4]))
@settings(max_examples=300)
def test_batches(events: list[tuple[str, int, int]], stages_at_once: list[int], tick_s: float) -> None:
    batcher = Batcher(max_rows=MAX_ROWS)
    sessions = [
        Session(
            SessionId(number), PeerId("client"), RANGES[number % 2], 10**6, 64, None, None, (), stages_at_once[number]
        )
        for number in range(6)
    ]
    waiting: defaultdict[int, list[Work]] = defaultdict(list)
    stepped_s: dict[int, float] = {}
    ends: defaultdict[int, int] = defaultdict(int)
    now_s = 0.0

    def take() -> bool:
        heads = [queue[0] for queue in waiting.values() if queue]
        batch = batcher.next_batch(now_s)
        if batch is None:
            assert not heads
            return False
        assert batch.works
        oldest = min(heads, key=lambda work: work.arrived_s)
        assert batch.blocks in {head.session.blocks for head in heads if head.arrived_s == oldest.arrived_s}
        assert all(work.session.blocks == batch.blocks for work in batch.works)
        numbers = [work.part.session for work in batch.works]
        assert len(set(numbers)) == len(numbers)
        for work in batch.works:
            assert waiting[work.part.session].pop(0) is work
        assert batch.rows <= MAX_ROWS or len(batch.works) == 1
        short = [work for work in batch.works if work.part.rows <= SHORT_ROWS]
        assert batch.works[0].arrived_s == oldest.arrived_s  # so that nobody starves
        first_long = batch.works[:1] if batch.works[0].part.rows > SHORT_ROWS else []
        assert list(batch.works)[len(first_long) :][: len(short)] == short
        fitting = [head for head in heads if head.session.blocks == batch.blocks]
        active = sum(now_s - at_s <= ACTIVE_S for at_s in stepped_s.values())
        allowed = max(1, -(-active // max(head.session.at_once for head in fitting)))
        possible = [head for head in fitting if head.part.rows <= SHORT_ROWS]
        assert len(short) <= allowed
        if sum(head.part.rows for head in [*first_long, *possible]) <= MAX_ROWS:
            assert len(short) == min(allowed, len(possible))
        return True

    for event, number, rows in events:
        now_s += tick_s
        if event == "add":
            part = Part(SessionId(number), ends[number], rows, 0)
            kept = [work for work in waiting[number] if work.part.position < part.position]
            overwritten = sum(work.part.rows for work in waiting[number]) - sum(work.part.rows for work in kept)
            assert batcher.overwritten(part) == overwritten
            work = Work(sessions[number], part, b"", now_s)
            batcher.add(work)
            waiting[number], ends[number] = [*kept, work], part.position + rows
            if rows <= SHORT_ROWS:
                stepped_s[number] = now_s
        elif event == "again":  # the next step begins before the end of the last
            ends[number] = max(0, ends[number] - rows)
        elif event == "drop":
            batcher.drop(SessionId(number))
            waiting[number].clear()
            stepped_s.pop(number, None)
        else:
            take()
        assert len(batcher) == sum(map(len, waiting.values()))
        for session in sessions:
            assert session.waiting == sum(work.part.rows for work in waiting[session.id])
    while take():
        pass
    assert not any(waiting.values())
    assert len(batcher) == 0
