"""The torch executor: a stage of the model library's own layers, on any device."""

from __future__ import annotations

import torch

from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.model.attention import Int8KVCache, KVCache, Segment
from bsns.model.stage import Stage
from bsns.model.tensors import to_memory, to_tensor
from bsns.worker.batching import Batch


class TorchExecutor:
    """See worker.executor.Executor."""

    name = "torch"

    def __init__(self, stage: Stage, *, dtype: str, kv: str = "none") -> None:
        """`kv`: `int8` keeps keys and values in eight bits."""
        self._stage = stage
        self._dtype = dtype
        self._new_cache = Int8KVCache if kv == "int8" else KVCache
        self._caches: dict[SessionId, KVCache] = {}

    @property
    def blocks(self) -> BlockRange:
        return self._stage.blocks

    @property
    def hidden_size(self) -> int:
        return self._stage.hidden_size

    @property
    def dtype(self) -> str:
        return self._dtype

    @property
    def device(self) -> str:
        return self._stage.device.type

    def open(self, session: SessionId, max_tokens: int) -> None:
        self._caches[session] = self._new_cache(max_tokens)

    def close(self, session: SessionId) -> None:
        self._caches.pop(session, None)

    def run(self, batch: Batch) -> list[memoryview]:
        segments: list[Segment] = []
        inputs: list[torch.Tensor] = []
        start = 0
        for work in batch.works:
            rows, position = work.part.rows, work.part.position
            cache = self._caches.get(work.part.session) or self._new_cache(position + rows)
            segments.append(Segment(cache, position, start, start + rows))
            inputs.append(to_tensor(work.hidden, self._dtype, (rows, self.hidden_size)))
            start += rows
        hidden_ND = inputs[0] if len(inputs) == 1 else torch.cat(inputs)
        output_ND = self._stage.run(hidden_ND, segments, batch.blocks)
        output = to_memory(output_ND)
        row_bytes = output.nbytes // start
        return [output[segment.start * row_bytes : segment.end * row_bytes] for segment in segments]
