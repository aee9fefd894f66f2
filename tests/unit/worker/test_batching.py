"""Which steps run together, and when."""

from __future__ import annotations

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import Part
from bsns.worker.batching import ACTIVE_S, SHORT_ROWS, Batch, Batcher, Work
from bsns.worker.sessions import Session

WHOLE = BlockRange(0, 4)


def session(number: int, *, at_once: int = 1, blocks: BlockRange = WHOLE) -> Session:
    return Session(SessionId(number), PeerId("client"), blocks, 10_000, 64, None, None, (), at_once)


def work(of: Session, rows: int = 1, position: int = 0, at_s: float = 0.0) -> Work:
    return Work(of, Part(of.id, position, rows, 0), b"", at_s)


def ids(batch: Batch | None) -> list[int]:
    return [] if batch is None else [chosen.part.session for chosen in batch.works]


def test_nothing_waits() -> None:
    batcher = Batcher()
    assert batcher.next_batch(0.0) is None
    batcher.add(work(session(1)))
    assert len(batcher) == 1
    assert batcher.next_batch(0.0) is not None
    assert batcher.next_batch(0.0) is None
    assert len(batcher) == 0


def test_a_batch_knows_its_start_rows_and_blocks() -> None:
    batcher = Batcher()
    batcher.add(work(session(1), 3))
    batcher.add(work(session(2), 20))
    batch = batcher.next_batch(7.5)
    assert batch is not None
    assert (batch.rows, batch.blocks) == (23, BlockRange(0, 4))
    assert [chosen.started_s for chosen in batch.works] == [7.5, 7.5]


def test_a_step_takes_the_place_of_those_that_it_overwrites() -> None:
    batcher, mine = Batcher(), session(1)
    batcher.add(work(session(2), 3))
    for position, rows in ((5, 4), (9, 4), (13, 4)):
        batcher.add(work(mine, rows, position))
    again = work(mine, 2, 9)
    assert batcher.overwritten(again.part) == 8
    batcher.add(again)
    assert (mine.waiting, len(batcher)) == (6, 3)
    batcher.add(work(mine, 1, 10))
    places = []
    while (batch := batcher.next_batch(0.0)) is not None:
        places += [chosen.part.position for chosen in batch.works if chosen.session is mine]
    assert places == [5, 9, 10]
    assert mine.waiting == 0


def test_short_steps_go_before_younger_prompt_chunks() -> None:
    batcher = Batcher(max_rows=100)
    batcher.add(work(session(5), 1, at_s=0.0))
    batcher.add(work(session(1), 60, at_s=0.1))
    batcher.add(work(session(2), 60, at_s=0.2))
    for number in (3, 4):
        batcher.add(work(session(number), SHORT_ROWS, at_s=0.3))
    assert ids(batcher.next_batch(0.4)) == [5, 3, 4, 1]
    assert ids(batcher.next_batch(0.4)) == [2]


def test_a_large_step_does_not_starve_behind_short_ones() -> None:
    batcher = Batcher(max_rows=10)
    batcher.add(work(session(1), 100, at_s=0.0))
    batcher.add(work(session(2), 1, at_s=0.1))
    assert ids(batcher.next_batch(0.2)) == [1]
    assert ids(batcher.next_batch(0.2)) == [2]


def test_where_others_decode_a_batch_takes_one_prompt_chunk() -> None:
    """However many prompts wait, a token waits for one chunk of them."""
    batcher = Batcher()
    chunks = [session(number) for number in range(4)]
    for number, of in enumerate(chunks):
        batcher.add(work(of, 100, at_s=number / 10))
    decoding = session(9)
    batcher.add(work(decoding, at_s=0.5))
    assert ids(batcher.next_batch(0.6)) == [0, 9]
    assert ids(batcher.next_batch(0.7)) == [1], "it steps again soon"
    batcher.add(work(decoding, at_s=0.8))
    batcher.add(work(chunks[0], 100, 100, at_s=0.8))
    assert ids(batcher.next_batch(0.9)) == [2, 9]
    assert ids(batcher.next_batch(0.8 + ACTIVE_S + 0.1)) == [3, 0], "nobody decodes any more"


def test_a_later_chunk_that_fits_fills_the_batch() -> None:
    batcher = Batcher(max_rows=100)
    for number, rows in ((1, 80), (2, 60), (3, 20)):
        batcher.add(work(session(number), rows, at_s=number / 10))
    assert ids(batcher.next_batch(1.0)) == [1, 3]
    assert ids(batcher.next_batch(1.0)) == [2]


def test_a_step_larger_than_a_batch_runs_alone() -> None:
    batcher = Batcher(max_rows=10)
    batcher.add(work(session(1), 50))
    batcher.add(work(session(2), 60))
    assert ids(batcher.next_batch(0.0)) == [1]
    assert ids(batcher.next_batch(0.0)) == [2]


def test_a_session_steps_once_a_batch_and_in_order() -> None:
    batcher = Batcher()
    one, two = session(1), session(2)
    for position in (0, 1, 2):
        batcher.add(work(one, position=position))
    batcher.add(work(two))
    seen: list[tuple[int, int]] = []
    while (batch := batcher.next_batch(0.0)) is not None:
        assert len(set(ids(batch))) == len(batch.works)
        seen += [(chosen.part.session, chosen.part.position) for chosen in batch.works]
    assert [position for number, position in seen if number == 1] == [0, 1, 2]
    assert (2, 0) in seen
    assert len(seen) == 4


def test_the_longest_waiting_step_decides_which_blocks_run() -> None:
    batcher = Batcher()
    few, many = BlockRange(1, 2), BlockRange(0, 4)
    batcher.add(work(session(1, blocks=many), at_s=0.2))
    batcher.add(work(session(2, blocks=few), at_s=0.1))
    batcher.add(work(session(3, blocks=many), at_s=0.3))
    first, second = batcher.next_batch(1.0), batcher.next_batch(1.0)
    assert first is not None
    assert second is not None
    assert (first.blocks, ids(first)) == (few, [2])
    assert (second.blocks, ids(second)) == (many, [1, 3])


@pytest.mark.parametrize(
    ("sessions", "at_once", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (8, 3, [3, 3, 2]),
        (7, 2, [4, 3]),
        (2, 3, [1, 1]),
        (1, 5, [1]),
        (3, 1024, [1, 1, 1]),
    ],
)
def test_every_stage_of_a_route_has_work(sessions: int, at_once: int, sizes: list[int]) -> None:
    """S sessions on D stages that compute at once: ⌈S / D⌉ a batch."""
    batcher = Batcher()
    for number in range(sessions):
        batcher.add(work(session(number, at_once=at_once), at_s=number / 1000))
    cut: list[int] = []
    while (batch := batcher.next_batch(0.1)) is not None:
        cut.append(len(batch.works))
    assert cut == sizes


def test_sessions_at_other_stages_count() -> None:
    """Two of four sessions wait here while the others are a stage further: this stage takes both, not one."""
    batcher = Batcher()
    four = [session(number, at_once=2) for number in range(4)]
    for each in four:
        batcher.add(work(each))
    assert ids(batcher.next_batch(0.0)) == [0, 1]
    assert ids(batcher.next_batch(0.0)) == [2, 3]
    for each in four[:2]:
        batcher.add(work(each, position=1, at_s=0.1))
    assert ids(batcher.next_batch(0.1)) == [0, 1]


def test_sessions_that_stopped_stepping_do_not_count() -> None:
    batcher = Batcher()
    for number in range(6):
        batcher.add(work(session(number, at_once=2), at_s=0.0))
    while batcher.next_batch(0.0) is not None:
        pass
    late_s = ACTIVE_S + 0.5
    for number in (0, 1):
        batcher.add(work(session(number, at_once=2), position=1, at_s=late_s))
    assert ids(batcher.next_batch(late_s)) == [0]


def test_prompt_chunks_do_not_count_as_stepping() -> None:
    batcher = Batcher()
    for number in (1, 2, 3):
        batcher.add(work(session(number, at_once=2), SHORT_ROWS + 1, at_s=0.0))
    assert ids(batcher.next_batch(0.0)) == [1, 2, 3]


def test_drop_forgets_all_of_a_session_and_nothing_else() -> None:
    batcher = Batcher()
    one, two, three = (session(number, at_once=2) for number in (1, 2, 3))
    for position in (0, 1):
        batcher.add(work(one, position=position))
    batcher.add(work(two, at_s=0.1))
    batcher.add(work(three, at_s=0.2))
    batcher.drop(one.id)
    batcher.drop(SessionId(99))
    assert len(batcher) == 2
    assert ids(batcher.next_batch(0.2)) == [2]  # two sessions step, not three: one a batch
    assert ids(batcher.next_batch(0.2)) == [3]
    assert batcher.next_batch(0.2) is None
