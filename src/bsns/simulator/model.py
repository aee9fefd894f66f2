"""A model whose activations are hashes of all that came before: whatever goes wrong on the way shows in the tokens.

Block b keeps for each session a chain c[p] = c[p-1] · A + x[p] + b over the rows x it was given, as attention keeps
keys and values, and hands on x[p] mixed with c[p]. So a block that misses a row, gets one twice, keeps one too many or
runs on another's cache makes all that follows wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bsns.client.sampling import SamplingOptions, sample
from bsns.core.blocks import BlockRange
from bsns.core.ids import SessionId
from bsns.worker.batching import Batch

HIDDEN_SIZE = 2
"""Two float32 places, whose bits are one hash."""
ROW_BYTES = 8
DTYPE = "float32"
VOCABULARY = 64
_MASK = 2**64 - 1
_A, _B, _C = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def pass_through(blocks: BlockRange, rows: Sequence[int], position: int, cache: list[list[int]]) -> list[int]:
    """The rows as they come out of the blocks; `cache` holds each position's chains and is overwritten from
    `position` on."""
    del cache[position:]
    chains = list(cache[-1]) if cache else [0] * len(blocks)
    out: list[int] = []
    for row in rows:
        value = row
        for index, block in enumerate(blocks):
            chain = chains[index] = (chains[index] * _A + value + block) & _MASK
            value = ((value ^ (chain >> 29)) * _B + chain) & _MASK
        cache.append(chains.copy())
        out.append(value)
    return out


def embedding(token: int, position: int) -> int:
    """The row that enters block 0."""
    return ((token + 1) * _C + position * _A) & _MASK


class HashExecutor:
    """See worker.executor.Executor. `cost` is told of every batch, and says what it takes."""

    name = "simulated"
    hidden_size = HIDDEN_SIZE
    dtype = DTYPE
    device = "cpu"

    def __init__(self, blocks: BlockRange, cost: Callable[[int, int], None]) -> None:
        """`cost` takes blocks and rows."""
        self.blocks = blocks
        self._cost = cost
        self.caches: dict[SessionId, list[list[int]]] = {}

    def open(self, session: SessionId, max_tokens: int) -> None:
        self.caches[session] = []

    def close(self, session: SessionId) -> None:
        self.caches.pop(session, None)

    def run(self, batch: Batch) -> list[memoryview]:
        self._cost(len(batch.blocks), batch.rows)
        outputs = []
        for work in batch.works:
            rows = memoryview(work.hidden).cast("B").cast("Q").tolist()
            cache = self.caches.get(work.session.id)
            out = pass_through(batch.blocks, rows, work.part.position, cache if cache is not None else [])
            outputs.append(memoryview(b"".join(value.to_bytes(8, "little") for value in out)))
        return outputs


class HashEnds:
    """In the place of model.ends.Ends. `cost` is told how many rows are embedded or looked at."""

    hidden_size = HIDDEN_SIZE
    vocab_size = VOCABULARY
    dtype = torch.float32

    def __init__(self, cost: Callable[[int], None] = lambda rows: None) -> None:
        self._cost = cost
        self._keys_V = (torch.arange(1, VOCABULARY + 1) * _signed(_A)) ^ _signed(_C)

    def embed(self, tokens_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        pairs = zip(tokens_N.tolist(), positions_N.tolist(), strict=True)
        rows_N = torch.tensor([_signed(embedding(token, position)) for token, position in pairs])
        return rows_N.view(torch.float32).reshape(-1, HIDDEN_SIZE)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        self._cost(len(hidden_ND))
        return self.scores(hidden_ND.contiguous().view(torch.int64).reshape(-1).tolist())

    def scores(self, rows: Sequence[int]) -> torch.Tensor:
        """Logits (rows, vocabulary) between 0 and 8."""
        mixed_NV = (torch.tensor([_signed(row) for row in rows])[:, None] ^ self._keys_V) * _signed(_B)
        return ((mixed_NV >> 40) & 0xFFFF).float() / 8192.0


def expected_tokens(prompt: Sequence[int], options: SamplingOptions, block_count: int) -> list[int]:
    """The answer of a model on one machine, undisturbed."""
    blocks, ends = BlockRange(0, block_count), HashEnds()
    cache: list[list[int]] = []
    tokens = list(prompt)
    rows = pass_through(blocks, [embedding(token, at) for at, token in enumerate(tokens)], 0, cache)
    while True:
        tokens.append(sample(ends.scores(rows[-1:])[0], tokens, options, len(tokens)))
        if len(tokens) - len(prompt) == options.max_tokens:
            return tokens[len(prompt) :]
        at = len(tokens) - 1
        rows = pass_through(blocks, [embedding(tokens[at], at)], at, cache)


def _signed(value: int) -> int:
    return (value & _MASK) - 2**64 if value & 2**63 else value & _MASK
