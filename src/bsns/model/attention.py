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
    """One session's keys and values on this stage: per layer a slab of `capacity` tokens.

    A slab's pages become resident when they are first written, so a reservation costs nothing until it is used.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slabs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer: int, position: int, k_1HND: torch.Tensor, v_1HND: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a segment at `position`; the layer's keys and values from 0 to its end, views of shape (1, H, L, D)."""
        slabs = self._slabs.get(layer)
        if slabs is None:
            slabs = self._slabs[layer] = (self._slab(k_1HND), self._slab(v_1HND))
        end = position + k_1HND.shape[2]
        keys, values = slabs
        keys[:, :, position:end] = k_1HND
        values[:, :, position:end] = v_1HND
        return keys[:, :, :end], values[:, :, :end]

    def _slab(self, sample_1HND: torch.Tensor) -> torch.Tensor:
        _, heads, _, head_size = sample_1HND.shape
        return torch.empty(1, heads, self.capacity, head_size, dtype=sample_1HND.dtype, device=sample_1HND.device)


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
    outputs = [
        _attend(
            ragged,
            segment,
            query[:, :, segment.start : segment.end],
            *segment.cache.write(
                layer,
                segment.position,
                key[:, :, segment.start : segment.end],
                value[:, :, segment.start : segment.end],
            ),
            scaling,
            sliding_window,
        )
        for segment in ragged.segments
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.transpose(1, 2), None


def _attend(
    ragged: Ragged,
    segment: Segment,
    q_1HND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    rows = segment.end - segment.start
    if rows == 1:
        if window is not None and keys.shape[2] > window:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        return _attend_one(q_1HND, keys, values, scaling)
    grouped = keys.shape[1] != q_1HND.shape[1]
    if segment.position == 0 and (window is None or rows <= window):
        return scaled_dot_product_attention(q_1HND, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
    mask = ragged.mask(segment.position, rows, window, q_1HND.device)
    return scaled_dot_product_attention(q_1HND, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def _attend_one(q_1H1D: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """One new token, which sees all keys given.

    The query heads that share a key head are laid out as rows of one small product: torch's CPU kernel takes 18 µs for
    3 rows against 92 µs for three heads of 1 row in bfloat16 (context 128), for it has no fast matrix-vector path.
    """
    _, heads, _, head_size = q_1H1D.shape
    key_heads = keys.shape[1]
    group = heads // key_heads
    if group == 1 and q_1H1D.dtype != torch.float32 and q_1H1D.device.type == "cpu":
        twice = scaled_dot_product_attention(q_1H1D.expand(-1, -1, 2, -1), keys, values, scale=scaling)
        return twice[:, :, :1]
    q_1KGD = q_1H1D.reshape(1, key_heads, group, head_size)
    output_1KGD = scaled_dot_product_attention(q_1KGD, keys, values, scale=scaling)
    return output_1KGD.reshape(1, heads, 1, head_size)


def _no_mask(*_: Any, **__: Any) -> None:
    """Which keys a token sees follows from its segment, so the library need not build a mask."""


AttentionInterface.register(NAME, ragged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
