"""What tests of the native executor share: a mark that skips without the library, and batches run on both stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from bsns.core.blocks import BlockRange
from bsns.model import attention
from bsns.model.stage import Stage
from bsns.model.tensors import TORCH_DTYPES, to_memory, to_tensor
from bsns.native.library import Library, native_library
from bsns.native.stage import Cache, NativeStage, Segment

_found = native_library()
needs_native = pytest.mark.skipif(isinstance(_found, str), reason=f"no native library: {_found}")
KERNELS = _found.kernels if isinstance(_found, Library) else ()
TOKENS = 96
"""The room of a session."""


def library() -> Library:
    found = native_library()
    assert isinstance(found, Library)
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """One session's rows in a batch; what they hold follows from the session, the position and `draft`."""

    session: str
    position: int
    rows: int
    draft: int = 0


def rows_of(part: Part, hidden: int) -> torch.Tensor:
    """(rows, hidden): a row is the same whatever it is cut into."""
    rows = []
    for position in range(part.position, part.position + part.rows):
        seed = hash((sum(part.session.encode()), position, part.draft)) % 2**31
        rows.append(torch.randn(hidden, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


@dataclass
class NativeRun:
    """Batches on a native stage, and the caches of their sessions."""

    stage: NativeStage
    caches: dict[str, Cache] = field(default_factory=dict)

    def batch(
        self, parts: Sequence[Part], blocks: BlockRange | None = None, rows: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """The output of each part, float32; `rows`: instead of what the parts would hold."""
        dtype, hidden = self.stage.dtype, self.stage.hidden_size
        segments = []
        for part in parts:
            if part.session not in self.caches:
                self.caches[part.session] = self.stage.open(TOKENS)
            segments.append(Segment(self.caches[part.session], part.position, part.rows))
        given = torch.cat(list(rows or (rows_of(part, hidden) for part in parts))).to(TORCH_DTYPES[dtype])
        output = to_tensor(self.stage.run(segments, to_memory(given), blocks), dtype, tuple(given.shape)).float()
        return list(output.split([part.rows for part in parts]))


@dataclass
class TorchRun:
    """The same on a stage of the model library's layers."""

    stage: Stage
    caches: dict[str, attention.KVCache] = field(default_factory=dict)
    new_cache: type[attention.KVCache] = attention.KVCache

    def batch(self, parts: Sequence[Part], blocks: BlockRange | None = None) -> list[torch.Tensor]:
        segments, start = [], 0
        for part in parts:
            cache = self.caches.setdefault(part.session, self.new_cache(TOKENS))
            segments.append(attention.Segment(cache, part.position, start, start + part.rows))
            start += part.rows
        given = torch.cat([rows_of(part, self.stage.hidden_size) for part in parts])
        return list(self.stage.run(given, segments, blocks).float().split([part.rows for part in parts]))
