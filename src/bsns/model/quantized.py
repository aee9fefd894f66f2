"""Linear layers in fewer bits for the torch executor, where the native one cannot serve.

In int8 on a CPU by mixed matrix decomposition, as LLM.int8() (Dettmers et al. 2022): y = (s_x ⊗ s_w)(X₈ W₈) + X_O W,
the product of bytes by oneDNN. Outliers are found number by number, as the native kernels find them, rather than column
by column: an outlier costs its own row alone. On CUDA that is bitsandbytes' Linear8bitLt.

In int4 on a CPU: the weights alone, of which 32 in a row share a factor, by torch's packed product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bsns.core.errors import BadOption, CorruptModel, UnsupportedModel
from bsns.model.linear import replace_linears

OUTLIER = 6.0
"""Activations of at least this size are kept out of int8."""
GROUP = 32
"""Weights in a row that share a step in int4."""
REACH, FACTORS = 7.5, 15
"""How many steps reach the largest weight of a row, and how many sizes steps may have in a row."""
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


class Int4Linear(nn.Module):
    """`x @ weight.T + bias`, the weight in halves of a byte that are what the native executor makes of it.

    torch's product takes its rows one by one: it is the quickest for up to 4 of them, and from some 8 on the layer in
    int8 is. Making a weight whole for a product takes torch as long as 128 rows do.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Raises CorruptModel for weights that are not finite."""
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        halves_OI, steps_OG = _halves(weight_OI.detach().float())
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(halves_OI, 1)
        steps_GO = steps_OG.t().to(torch.bfloat16)
        self._steps_GO2 = torch.stack([steps_GO, torch.zeros_like(steps_GO)], 2).contiguous()
        self._bias = None if bias_O is None else bias_O.detach().clone()  # of its own: not the checkpoint's file

    @staticmethod
    def fits(weight_OI: torch.Tensor) -> bool:
        """Whether torch's product takes a weight of this shape."""
        outputs, inputs = weight_OI.shape
        return outputs % 16 == 0 and inputs % GROUP == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, self.in_features).to(torch.bfloat16)
        y_NO = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, self._packed, GROUP, self._steps_GO2)
        if self._bias is not None:
            y_NO = y_NO + self._bias
        y: torch.Tensor = y_NO.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y


def _halves(rows_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as whole numbers 0…15, which stand for -8…7 steps, and the step of every `GROUP` of them, as native/pack.cpp
    chooses it: the multiple of a 15th of the row's largest that rounds the group best. Raises CorruptModel."""
    outputs, inputs = rows_OI.shape
    groups_OGC = rows_OI.reshape(outputs, -1, GROUP)
    largest_OG = groups_OGC.abs().amax(2)
    units_O1 = largest_OG.amax(1, keepdim=True) / REACH / FACTORS
    if not bool(units_O1.isfinite().all()):
        raise CorruptModel("weights that are not finite; fetch the model again")
    units_O1 = units_O1.clamp_min(_TINY)
    reaching_OG = (largest_OG / REACH / units_O1).round().clamp(1, FACTORS)
    first_OG = (reaching_OG * 2 / 3).floor().clamp_min(1)
    best_OG, least_OG = reaching_OG.clone(), torch.full_like(reaching_OG, torch.inf)
    for more in range(FACTORS // 3 + 2):
        factor_OG = (first_OG + more).minimum((reaching_OG + 1).clamp_max(FACTORS))
        step_OG1 = (units_O1 * factor_OG).unsqueeze(2)
        off_OGC = (groups_OGC / step_OG1).round_().clamp_(-8, 7).mul_(step_OG1).sub_(groups_OGC)
        error_OG = off_OGC.square_().sum(2)
        better_OG = error_OG < least_OG
        best_OG, least_OG = factor_OG.where(better_OG, best_OG), error_OG.where(better_OG, least_OG)
    steps_OG = units_O1 * best_OG
    halves_OGC = (groups_OGC / steps_OG.unsqueeze(2)).round_().clamp_(-8, 7).add_(8).to(torch.int32)
    return halves_OGC.reshape(outputs, inputs), steps_OG


def quantize_linears(root: nn.Module, quant: str, device: torch.device) -> int:
    """Replace every linear layer below `root` by one in `int8` or `int4`, and say how many there were. `device`: where
    they will compute; those for CUDA become small as they are moved there.

    Raises CorruptModel, BadOption where that cannot be there, and UnsupportedModel for experts, which the library keeps
    in tensors of three dimensions.
    """
    if any(parameter.dim() > 2 for parameter in root.parameters()):
        raise UnsupportedModel(f"the torch executor keeps no experts in {quant}; leave out --quant")
    return replace_linears(root, _maker(quant, device))


def _maker(quant: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor | None], nn.Module]:
    if device.type == "cpu":
        return Int8Linear if quant == "int8" else _int4_where_it_fits
    if device.type != "cuda" or quant != "int8":
        raise BadOption(f"weights in {quant} cannot be computed with on {device.type}; leave out --quant")
    return _bitsandbytes_linear


def _int4_where_it_fits(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Module:
    return Int4Linear(weight_OI, bias_O) if Int4Linear.fits(weight_OI) else Int8Linear(weight_OI, bias_O)


def _bitsandbytes_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> nn.Module:
    """Raises BadOption where bitsandbytes is missing."""
    try:
        from bitsandbytes.nn import Int8Params, Linear8bitLt
    except ImportError as error:
        raise BadOption(f"--quant int8 on CUDA needs bitsandbytes ({error}): pip install 'bsns[cuda]'") from None
    outputs, inputs = weight_OI.shape
    with torch.device("meta"):
        layer = Linear8bitLt(inputs, outputs, bias=bias_O is not None, has_fp16_weights=False, threshold=OUTLIER)
    layer.weight = Int8Params(weight_OI.detach(), requires_grad=False, has_fp16_weights=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return layer  # type: ignore[no-any-return]
