"""Ragged attention against attention written out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from bsns.core.errors import UnsupportedModel
from bsns.model.attention import Int8KVCache, KVCache, Ragged, Segment, ragged_attention

torch.set_num_threads(1)
HEAD_SIZE = 8
LAYER = SimpleNamespace(layer_idx=3)


class Text:
    """A session's queries, keys and values for every position, as random numbers."""

    def __init__(self, length: int, heads: int, key_heads: int, dtype: torch.dtype, seed: int = 1) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.q, self.k, self.v = (
            torch.randn(1, count, length, HEAD_SIZE, generator=draw).to(dtype)
            for count in (heads, key_heads, key_heads)
        )
        self.cache = KVCache(length)

    def naive(self, window: int | None = None) -> torch.Tensor:
        """(length, heads, head size) in float64: every position attends to all it may see."""
        q, k, v = (t[0].double() for t in (self.q, self.k, self.v))
        heads, length, _ = q.shape
        output = torch.empty(length, heads, HEAD_SIZE, dtype=torch.float64)
        for head in range(heads):
            key_head = head * len(k) // heads
            for at in range(length):
                first = 0 if window is None else max(0, at - window + 1)
                scores = k[key_head, first : at + 1] @ q[head, at] * HEAD_SIZE**-0.5
                output[at, head] = scores.softmax(0) @ v[key_head, first : at + 1]
        return output


def attend(*chunks: tuple[Text, int, int], window: int | None = None) -> list[torch.Tensor]:
    """One batch: positions [start, end) of each text. For each its (rows, heads, head size)."""
    segments, start = [], 0
    for text, first, end in chunks:
        segments.append(Segment(text.cache, first, start, start + end - first))
        start += end - first
    q, k, v = (
        torch.cat([getattr(text, name)[:, :, first:end] for text, first, end in chunks], dim=2) for name in "qkv"
    )
    ragged = Ragged(segments)
    output, _ = ragged_attention(LAYER, q, k, v, scaling=HEAD_SIZE**-0.5, sliding_window=window, ragged=ragged)  # type: ignore[arg-type]
    assert ragged.calls == 1
    assert output.shape[:2] == (1, start)
    return [output[0, segment.start : segment.end] for segment in segments]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-2 if actual.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# 6 over 2: heads in groups; 4 over 4: each its own keys, which takes a detour in bfloat16; 4 over 1: one for all.
HEADS = pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (4, 1)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 3, 7, 100])


@HEADS
@DTYPES
@WINDOWS
def test_prompt_then_token_by_token(heads: int, key_heads: int, dtype: torch.dtype, window: int | None) -> None:
    text = Text(14, heads, key_heads, dtype)
    expected = text.naive(window)
    close(attend((text, 0, 9), window=window)[0], expected[:9])
    for at in range(9, 14):
        close(attend((text, at, at + 1), window=window)[0], expected[at : at + 1])


@HEADS
@DTYPES
@WINDOWS
@pytest.mark.parametrize("cuts", [(0, 1, 2, 14), (0, 5, 10, 14), (0, 7, 8, 14)])
def test_prompt_in_chunks(
    heads: int, key_heads: int, dtype: torch.dtype, window: int | None, cuts: tuple[int, ...]
) -> None:
    text = Text(14, heads, key_heads, dtype)
    expected = text.naive(window)
    for first, end in itertools.pairwise(cuts):
        close(attend((text, first, end), window=window)[0], expected[first:end])


@WINDOWS
def test_many_sessions_at_once(window: int | None) -> None:
    texts = [Text(12, 4, 2, torch.float32, seed) for seed in range(4)]
    expected = [text.naive(window) for text in texts]
    reached = [0, 0, 0, 0]
    # Prompts, a session that pauses, single tokens and chunks side by side.
    for ends in ((11, 5, 1, 3), (12, 6, 1, 8), (12, 9, 2, 12)):
        moving = [number for number in range(4) if ends[number] > reached[number]]
        outputs = attend(*((texts[number], reached[number], ends[number]) for number in moving), window=window)
        for number, output in zip(moving, outputs, strict=True):
            close(output, expected[number][reached[number] : ends[number]])
        reached = list(ends)


@HEADS
@pytest.mark.parametrize("rows", [1, 3])
def test_writing_again_at_an_earlier_position(heads: int, key_heads: int, rows: int) -> None:
    """What was written from there on is gone: the rest of the text reads as if the other had never been."""
    kept, other = Text(12, heads, key_heads, torch.float32, 1), Text(12, heads, key_heads, torch.float32, 2)
    attend((kept, 0, 6))
    other.cache = kept.cache
    attend((other, 6, 12))
    expected = kept.naive()
    for at in range(6, 12, rows):
        close(attend((kept, at, at + rows))[0], expected[at : at + rows])
    close(attend((kept, 0, 12))[0], expected)


def test_layers_do_not_share_their_slabs() -> None:
    cache = KVCache(2)
    cache.write(0, 0, torch.zeros(2, 1, 1, 2, 4))
    cache.write(1, 0, torch.ones(2, 1, 1, 2, 4))
    keys, values = cache.read(0, 0, 2)
    assert keys.shape == values.shape == (1, 1, 2, 4)
    assert float(keys.abs().sum() + values.abs().sum()) == 0.0


@HEADS
@DTYPES
@pytest.mark.parametrize("window", [None, 3])
def test_keys_and_values_in_int8(heads: int, key_heads: int, dtype: torch.dtype, window: int | None) -> None:
    """As exact as eight bits are, in a prompt, token by token, and where it is written again."""
    text = Text(14, heads, key_heads, dtype)
    text.cache = Int8KVCache(14)
    expected = text.naive(window)

    def near(actual: torch.Tensor, wanted: torch.Tensor) -> None:
        assert float((actual.double() - wanted).norm() / wanted.norm()) < 0.02

    near(attend((text, 0, 9), window=window)[0], expected[:9])
    for at in range(9, 14):
        near(attend((text, at, at + 1), window=window)[0], expected[at : at + 1])
    near(attend((text, 5, 12), window=window)[0], expected[5:12])
    for layer, slab in text.cache._slabs.items():
        assert slab.dtype == torch.int8
        assert slab.shape == (2, 1, key_heads, 14, HEAD_SIZE)
        assert layer == LAYER.layer_idx


def test_an_int8_cache_of_zeros() -> None:
    cache = Int8KVCache(2)
    cache.write(0, 0, torch.zeros(2, 1, 1, 2, 4))
    assert all(float(kept.abs().sum()) == 0.0 for kept in cache.read(0, 0, 2))


@pytest.mark.parametrize("feature", ["softcap", "s_aux"])
def test_features_not_computed_are_refused(feature: str) -> None:
    x = torch.zeros(1, 1, 1, HEAD_SIZE)
    ragged = Ragged([Segment(KVCache(1), 0, 0, 1)])
    value = 50.0 if feature == "softcap" else torch.zeros(1)
    with pytest.raises(UnsupportedModel):
        ragged_attention(LAYER, x, x, x, ragged=ragged, **{feature: value})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel):
        ragged_attention(LAYER, x, x, x)  # type: ignore[arg-type]
