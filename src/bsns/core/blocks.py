"""Block ranges: the half-open interval of a model's decoder blocks that one node holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bsns.core.errors import BadRange


@dataclass(frozen=True, slots=True, order=True)
class BlockRange:
    """Blocks `start` to `end - 1`. Raises BadRange when it is empty or negative."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BadRange(f"block range {self.start}:{self.end} is empty or negative")

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def covers(self, other: BlockRange) -> bool:
        return self.start <= other.start and other.end <= self.end

    @classmethod
    def parse(cls, text: str, block_count: int) -> BlockRange:
        """`"4:8"` as a range of a model with `block_count` blocks. Raises BadRange."""
        start, colon, end = text.partition(":")
        try:
            blocks = cls(int(start), int(end)) if colon else cls(int(start), int(start) + 1)
        except ValueError:
            raise BadRange(f"{text!r} is not a block range; write START:END, for example 0:10") from None
        if blocks.end > block_count:
            raise BadRange(f"blocks {blocks} do not exist: this model has blocks 0:{block_count}")
        return blocks


def missing_blocks(held: Iterable[BlockRange], block_count: int) -> tuple[BlockRange, ...]:
    """The maximal ranges of 0:block_count that nobody in `held` covers, in order."""
    gaps: list[BlockRange] = []
    reached = 0
    for blocks in sorted(held):
        if blocks.start > reached:
            gaps.append(BlockRange(reached, min(blocks.start, block_count)))
        reached = max(reached, blocks.end)
        if reached >= block_count:
            break
    if reached < block_count:
        gaps.append(BlockRange(reached, block_count))
    return tuple(gaps)
