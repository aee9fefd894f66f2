"""Ragged attention: many sessions' new tokens in one call, each against its own KV cache.

Registered with the model library as the attention implementation `bsns`, so that every decoder family's own layers call
it. All sessions' new tokens are concatenated along the sequence axis, (1, N, hidden), so that the linear layers see all
N rows at once; here the rows part again.

The rule of the cache: a segment at position p overwrites everything from p on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from bsns.core.errors import UnsupportedModel

NAME = "bsns"


class KVCache:
    """One session's keys and values on this stage: per layer a slab (2, 1, heads, capacity in tokens, head size).

    A slab's pages become resident when they are first written, so a reservation costs nothing until it is used.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slabs: dict[int, torch.Tensor] = {}

    def write(self, layer: int, position: int, kv_21HND: torch.Tensor) -> None:
        """Keep a layer's keys and values of N tokens, the first at `position`."""
        self._slab(layer, kv_21HND[0]).narrow(3, position, kv_21HND.shape[3]).copy_(kv_21HND)

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        """A layer's keys and values (1, heads, end - start, head size), as attention computes with them."""
        return self._slabs[layer].narrow(3, start, end - start).unbind(0)

    def _slab(self, layer: int, k_1HND: torch.Tensor) -> torch.Tensor:
        """The layer's slab; `k_1HND` shows what its keys look like when it is made."""
        slab = self._slabs.get(layer)
        if slab is None:
            _, heads, _, size = k_1HND.shape
            slab = torch.empty(2, 1, heads, self.capacity, size, dtype=k_1HND.dtype, device=k_1HND.device)
            self._slabs[layer] = slab
        return slab


class Int8KVCache(KVCache):
    """The same in int8, with a scale for each head and token. Attention reads one layer of one session at a time as it
    computes; all of them are never there at once."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._scales: dict[int, torch.Tensor] = {}
        self._dtype = torch.float32

    def write(self, layer: int, position: int, kv_21HND: torch.Tensor) -> None:
        count = kv_21HND.shape[3]
        if layer not in self._slabs:
            self._dtype = kv_21HND.dtype
            shape = (*kv_21HND.shape[:3], self.capacity, kv_21HND.shape[4])
            self._slabs[layer] = torch.empty(shape, dtype=torch.int8, device=kv_21HND.device)
            self._scales[layer] = torch.empty((*shape[:4], 1), device=kv_21HND.device)
        values = kv_21HND.float()
        scales = values.abs().amax(4, keepdim=True) / 127
        self._scales[layer].narrow(3, position, count).copy_(scales)
        codes = (values / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_()
        self._slabs[layer].narrow(3, position, count).copy_(codes)

    def read(self, layer: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        codes, scales = (kept[layer].narrow(3, start, end - start) for kept in (self._slabs, self._scales))
        return (codes * scales).to(self._dtype).unbind(0)


@dataclass(slots=True)
class Segment:
    """Rows [start, end) of a batch: one session's new tokens, the first of them at `position`."""

    cache: KVCache
    position: int
    start: int
    end: int


@dataclass(slots=True)
class Ragged:
    """What a batch's attention needs to know, handed through the layers as a keyword argument."""

    segments: Sequence[Segment]
    calls: int = 0
    """How often attention ran: the witness that each layer used it."""
    _masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, position: int, rows: int, window: int | None, device: torch.device) -> torch.Tensor:
        """(rows, position + rows) booleans: which keys each new token may see. Shared by all layers of a batch."""
        key = (position, rows, window)
        mask = self._masks.get(key)
        if mask is None:
            at = torch.arange(position, position + rows, device=device)[:, None]
            seen = torch.arange(position + rows, device=device)[None, :]
            mask = seen <= at
            if window is not None:
                mask &= seen > at - window
            self._masks[key] = mask
        return mask


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    ragged: Ragged | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over (1, heads, N, head size) for all segments of a batch; returns (1, N, heads, head size).

    Raises UnsupportedModel for attention features this function does not compute.
    """
    if ragged is None or softcap is not None or s_aux is not None:
        raise UnsupportedModel(f"{type(module).__name__} needs attention features that BSNS does not compute yet")
    ragged.calls += 1
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    heads, rows, size = query.shape[1:]
    key_heads = key.shape[1]
    # All rows are parted by a handful of calls here: what is called per session is what a step of many sessions costs.
    kv_21HND = torch.stack((key, value))
    q_N1KGD = query[0].transpose(0, 1).reshape(rows, 1, key_heads, heads // key_heads, size)
    kv_rows, q_rows = kv_21HND.unsqueeze(4).unbind(3), q_N1KGD.unbind(0)
    outputs: list[torch.Tensor] = []
    for segment in ragged.segments:
        start, position = segment.start, segment.position
        count = segment.end - start
        cache = segment.cache
        if count == 1:
            cache.write(layer, position, kv_rows[start])
            seen = position + 1 if sliding_window is None else min(position + 1, sliding_window)
            keys, values = cache.read(layer, position + 1 - seen, position + 1)
            outputs.append(_attend_one(q_rows[start], keys, values, scaling).reshape(1, heads, size))
        else:
            cache.write(layer, position, kv_21HND.narrow(3, start, count))
            keys, values = cache.read(layer, 0, position + count)
            q_1HND = query.narrow(2, start, count)
            outputs.append(_attend_many(ragged, segment, q_1HND, keys, values, scaling, sliding_window))
    output_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_NHD[None], None


def _attend_many(
    ragged: Ragged,
    segment: Segment,
    q_1HND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Several new tokens of one session, each of which sees what is before it; (rows, heads, head size)."""
    rows = segment.end - segment.start
    grouped = keys.shape[1] != q_1HND.shape[1]
    if segment.position == 0 and (window is None or rows <= window):
        output = scaled_dot_product_attention(q_1HND, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
    else:
        mask = ragged.mask(segment.position, rows, window, q_1HND.device)
        output = scaled_dot_product_attention(q_1HND, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return output[0].transpose(0, 1)


def _attend_one(q_1KGD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """One new token, which sees all keys given; its query heads grouped by the key head they share.

    The group makes the rows of one small product: torch's CPU kernel takes 18 µs for 3 rows against 92 µs for three
    heads of 1 row in bfloat16 (context 128), for it has no fast matrix-vector path.
    """
    if q_1KGD.shape[2] == 1 and q_1KGD.dtype != torch.float32 and q_1KGD.device.type == "cpu":
        twice = scaled_dot_product_attention(q_1KGD.expand(-1, -1, 2, -1), keys, values, scale=scaling)
        return twice[:, :, :1]
    return scaled_dot_product_attention(q_1KGD, keys, values, scale=scaling)


def _no_mask(*_: Any, **__: Any) -> None:
    """Which keys a token sees follows from its segment, so the library need not build a mask."""


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
