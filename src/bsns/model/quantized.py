"""Linear layers in int8 for the torch executor, where the native one cannot serve: mixed matrix decomposition.

As LLM.int8() (Dettmers et al. 2022): y = (s_x ⊗ s_w)(X₈ W₈) + X_O W, the product of bytes by oneDNN. Outliers are found
number by number, as the native kernels find them, rather than column by column: an outlier costs its own row alone.
"""

from __future__ import annotations

import torch
from torch import nn

from bsns.core.errors import CorruptModel, UnsupportedModel
from bsns.model.linear import replace_linears

OUTLIER = 6.0
"""Activations of at least this size are kept out of int8."""
_TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """`x @ weight.T + bias`, the weight in int8 with a scale for each output, activations with one for each row."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Raises CorruptModel for weights that are not finite."""
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self._codes_OI, scales_O1 = _codes(weight_OI.detach().float())
        if not bool(scales_O1.isfinite().all()):
            raise CorruptModel("weights that are not finite; fetch the model again")
        self._scales_O = scales_O1.squeeze(1)
        self._bias = None if bias_O is None else bias_O.detach().clone()  # of its own: not the checkpoint's file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, self.in_features).float()
        is_outlier_NI = x_NI.abs() >= OUTLIER
        columns = is_outlier_NI.any(0).nonzero().squeeze(1)
        codes_NI, scales_N1 = _codes(x_NI.masked_fill(is_outlier_NI, 0.0) if len(columns) else x_NI)
        if self.in_features > 1:
            products_NO = torch._int_mm(codes_NI, self._codes_OI.t())
        else:  # of a single column torch's product is wrong
            products_NO = codes_NI.int() * self._codes_OI.t().int()
        y_NO = products_NO.float() * scales_N1 * self._scales_O
        if len(columns):
            outliers_NC = (x_NI * is_outlier_NI)[:, columns]
            y_NO += outliers_NC @ self._codes_OI[:, columns].float().t() * self._scales_O
        if self._bias is not None:
            y_NO += self._bias
        y: torch.Tensor = y_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y


def _codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in int8, and the scale of each."""
    scales = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scales.clamp_min(_TINY)).round_().to(torch.int8), scales


def quantize_linears(root: nn.Module) -> int:
    """Replace every linear layer below `root` by one in int8, and say how many there were.

    Raises CorruptModel, and UnsupportedModel for experts, which the library keeps in tensors of three dimensions.
    """
    if any(parameter.dim() > 2 for parameter in root.parameters()):
        raise UnsupportedModel("the torch executor keeps no experts in int8; leave out --quant")
    return replace_linears(root, Int8Linear)
