"""Linear layers in int8: how exact, with outliers and without, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bsns.core.errors import CorruptModel, UnsupportedModel
from bsns.model.quantized import OUTLIER, Int8Linear, quantize_linears
from bsns.native import stage as native

torch.set_num_threads(1)


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 96, bias=bias)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_it_computes_the_layer(rows: int, bias: bool) -> None:
    exact = layer(bias)
    short = Int8Linear(exact.weight, exact.bias)
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(1))
    assert short(x).shape == (2, rows, 96)
    assert error(short(x), exact(x)) < 0.015


@torch.inference_mode()
def test_outliers_are_kept_out() -> None:
    """Three columns sixty times as large: plain int8 is off by a tenth."""
    exact = layer()
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    x[:, [7, 100, 200]] *= 60
    short = Int8Linear(exact.weight, exact.bias)
    assert error(short(x), exact(x)) < 0.01
    every = torch.full((2, 256), 50.0)  # nothing is left for int8
    assert error(short(every), exact(every)) < 0.01


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other() -> None:
    exact = layer()
    short = Int8Linear(exact.weight, exact.bias)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    x[3, 5] = 1000.0
    torch.testing.assert_close(short(x)[0], short(x[:1])[0])


@torch.inference_mode()
def test_a_single_column() -> None:
    weight = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(1))
    assert error(Int8Linear(weight, None)(x), x @ weight.t()) < 0.01


@torch.inference_mode()
def test_zeros_and_what_is_no_number() -> None:
    short = Int8Linear(torch.zeros(4, 8), None)
    assert not bool(short(torch.zeros(2, 8)).any())
    assert not bool(short(torch.full((1, 8), torch.nan)).isfinite().any())
    for bad in (torch.nan, torch.inf):
        with pytest.raises(CorruptModel, match="not finite"):
            Int8Linear(torch.full((4, 8), bad), None)


def test_every_linear_layer_is_replaced_and_half_the_size() -> None:
    stack = nn.Sequential(layer(), nn.ReLU(), nn.Sequential(nn.Linear(96, 64)))
    assert quantize_linears(stack) == 2
    assert isinstance(stack[0], Int8Linear)
    assert stack[0]._codes_OI.dtype == torch.int8
    assert not list(stack.parameters())


def test_outliers_begin_where_they_do_natively() -> None:
    assert OUTLIER == native.OUTLIER


def test_experts_are_refused() -> None:
    experts = nn.Module()
    experts.weights = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(UnsupportedModel, match="experts"):
        quantize_linears(experts)
