"""The native executor: a stage of our own kernels, on a CPU."""

from __future__ import annotations

import threading

from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.native.stage import Cache, NativeStage, Segment
from bsns.protocol.frames import Buffer
from bsns.worker.batching import Batch


class NativeExecutor:
    """See worker.executor.Executor. A session's cache is freed when it closes, or else by the batch that uses it."""

    name = "native"
    device = "cpu"

    def __init__(self, stage: NativeStage) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._caches: dict[SessionId, Cache] = {}
        self._in_use: set[Cache] = set()
        self._ended: list[Cache] = []
        """Closed while in use."""

    @property
    def blocks(self) -> BlockRange:
        return self._stage.blocks

    @property
    def hidden_size(self) -> int:
        return self._stage.hidden_size

    @property
    def dtype(self) -> str:
        return self._stage.dtype

    def open(self, session: SessionId, max_tokens: int) -> None:
        cache = self._stage.open(max_tokens)
        self.close(session)
        with self._lock:
            self._caches[session] = cache

    def close(self, session: SessionId) -> None:
        with self._lock:
            cache = self._caches.pop(session, None)
            if cache is None:
                return
            if cache in self._in_use:
                self._ended.append(cache)
                return
        cache.close()

    def run(self, batch: Batch) -> list[memoryview]:
        with self._lock:
            caches = [self._caches.get(work.part.session) for work in batch.works]
            self._in_use.update(cache for cache in caches if cache is not None)
        own: list[Cache] = []
        try:
            segments: list[Segment] = []
            for work, cache in zip(batch.works, caches, strict=True):
                position, rows = work.part.position, work.part.rows
                if cache is None:
                    own.append(cache := self._stage.open(position + rows))
                segments.append(Segment(cache, position, rows))
            output = self._stage.run(segments, _joined([work.hidden for work in batch.works]), batch.blocks)
        finally:
            self._release(own)
        if len(segments) == 1:
            return [output]
        outputs: list[memoryview] = []
        start = 0
        for segment in segments:
            end = start + segment.rows * self._stage.row_bytes
            outputs.append(output[start:end])
            start = end
        return outputs

    def _release(self, own: list[Cache]) -> None:
        """No batch runs any more; `own` were its alone."""
        with self._lock:
            self._in_use.clear()
            ended, self._ended = self._ended, []
        for cache in (*ended, *own):
            cache.close()


def _joined(inputs: list[Buffer]) -> Buffer:
    """All rows in one buffer; the only copy, and none where there is but one step."""
    return inputs[0] if len(inputs) == 1 else b"".join(inputs)
