"""The ceiling of a pipeline of processes: the same stages and ends, joined by operating-system pipes and nothing else.

What a swarm loses against one process is partly its protocol and partly what any cut into processes costs on this
machine: a process is slower at its turn when another has computed in between. These rows are the second part alone.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from bsns.core.blocks import BlockRange
from bsns.model.ends import Ends
from bsns.model.source import ModelSource
from bsns.model.tensors import to_memory, to_tensor
from bsns.node.alone import Alone

START_S = 120.0
TOKENS = 128
"""Of context, after which a stage begins anew."""


class PipeLine:
    """Processes that each run a range, and this one's ends; batch of one, greedy."""

    def __init__(self, source: ModelSource, ranges: list[BlockRange], *, dtype: str, threads: int, ends: Ends) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends = ends
        self._dtype = dtype
        pipes = [context.Pipe(duplex=False) for _ in range(len(ranges) + 1)]
        self._first, self._last = pipes[0][1], pipes[-1][0]
        self._processes: list[SpawnProcess] = []
        for index, blocks in enumerate(ranges):
            arguments = (source, blocks, dtype, threads, pipes[index][0], pipes[index + 1][1])
            process = context.Process(target=_stage, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)

    def tokens_per_s(self, prompt: list[int], tokens: int) -> float:
        """Decoding speed over `tokens` tokens. Raises TimeoutError if the processes do not come up."""
        token, started_s = prompt[0], 0.0
        for position in range(tokens):
            hidden = self._ends.embed(torch.tensor([token]), torch.tensor([position]))
            self._first.send_bytes(bytes(to_memory(hidden)))
            if not self._last.poll(START_S):
                raise TimeoutError("the pipeline's processes did not come up")
            row = to_tensor(self._last.recv_bytes(), self._dtype, (1, self._ends.hidden_size))
            token = int(self._ends.logits(row)[0].argmax())
            if position == 0:
                started_s = time.perf_counter()
        return (tokens - 1) / (time.perf_counter() - started_s)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _stage(
    model: ModelSource, blocks: BlockRange, dtype: str, threads: int, source: Connection, sink: Connection
) -> None:
    torch.set_num_threads(threads)
    alone, position = Alone(model, blocks, dtype=dtype, threads=threads), 0
    alone.open(0, TOKENS)
    while True:
        (output,) = alone.run([(0, position, 1, source.recv_bytes())])
        sink.send_bytes(output)
        position = (position + 1) % TOKENS
