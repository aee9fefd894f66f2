"""Prepacked bfloat16 linear layers for CPUs.

oneDNN reads a weight fastest in its own blocked layout; packing it once at load instead of on every call is worth
1.7× a step at batch 1 on a 135 M model (docs/decisions/0003-stage-engine.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# With AMX a weight packed for 16 rows, in blocks of 32 columns instead of 64, is read faster by 1 row too. AVX-512 BF16
# packs alike for 1 and 16, and AVX-512 without it lost 6 % by 16 (docs/decisions/0003-stage-engine.md).
PACKED_FOR_ROWS = 16 if torch.cpu._is_amx_tile_supported() else 1


class PackedLinear(nn.Module):
    """`x @ weight.T + bias` with the weight in oneDNN's layout; keeps no unpacked copy."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), PACKED_FOR_ROWS)
        self._packed: torch.Tensor = packed  # not a Parameter: an opaque layout that cannot be saved or moved
        self._bias = None if bias_O is None else bias_O.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return output


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Where this says no, bfloat16 runs in the layers as they are: oneDNN has no bfloat16 below AVX-512 and AVX-NE."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(built and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(root: nn.Module) -> int:
    """Replace every linear layer below `root` by a packed one, and say how many there were."""
    return replace_linears(root, PackedLinear)


def replace_linears(root: nn.Module, make: Callable[[torch.Tensor, torch.Tensor | None], nn.Module]) -> int:
    """Replace every linear layer below `root` by what `make` gives for its weight (outputs, inputs) and bias, one at a
    time, and say how many there were."""
    replaced = 0
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child.weight, child.bias))
            elif type(child) is Conv1D:  # GPT-2 keeps its weights transposed
                setattr(parent, name, make(child.weight.t(), child.bias))  # type: ignore[operator, arg-type]
            else:
                continue
            replaced += 1
    return replaced
