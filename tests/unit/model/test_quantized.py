"""Linear layers in fewer bits: how exact, with outliers and without, and what they refuse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from bsns.core.errors import BadOption, CorruptModel, UnsupportedModel
from bsns.model.quantized import GROUP, OUTLIER, Int4Linear, Int8Linear, _halves, quantize_linears
from bsns.native import stage as native

torch.set_num_threads(1)
CPU = torch.device("cpu")


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
    assert quantize_linears(stack, "int8", CPU) == 2
    assert isinstance(stack[0], Int8Linear)
    assert stack[0]._codes_OI.dtype == torch.int8
    assert not list(stack.parameters())


def test_outliers_begin_where_they_do_natively() -> None:
    assert OUTLIER == native.OUTLIER


def test_experts_are_refused() -> None:
    experts = nn.Module()
    experts.weights = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(UnsupportedModel, match="experts"):
        quantize_linears(experts, "int8", CPU)


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_int4_computes_what_its_weights_are(rows: int, dtype: torch.dtype) -> None:
    exact = layer()
    halves, steps = _halves(exact.weight)
    weight = ((halves - 8).reshape(96, -1, GROUP) * steps.unsqueeze(2)).reshape(96, 256)
    assert error(weight, exact.weight) < 0.09
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = Int4Linear(exact.weight, exact.bias)(x)
    assert (y.dtype, y.shape) == (dtype, (2, rows, 96))
    assert error(y.float(), x.float() @ weight.t() + exact.bias) < 0.005


@torch.inference_mode()
def test_int4_rounds_as_the_native_executor_does() -> None:
    """By native/pack.cpp a group's step is the multiple of a 15th of the row's that leaves the least error, among those
    from two thirds of what reaches the group's largest number on."""
    row = torch.randn(1, 4 * GROUP, generator=torch.Generator().manual_seed(2))
    halves, steps = _halves(row)
    unit = float(row.abs().max()) / 7.5 / 15
    for group in range(4):
        numbers = row[0, group * GROUP : (group + 1) * GROUP]

        def off(step: float, numbers: torch.Tensor = numbers) -> float:
            return float(((numbers / step).round().clamp(-8, 7) * step - numbers).square().sum())

        reaching = round(float(numbers.abs().max()) / 7.5 / unit)
        tried = range(max(1, reaching * 2 // 3), min(15, reaching + 1) + 1)
        best = min(tried, key=lambda factor: off(unit * factor))
        assert float(steps[0, group]) == pytest.approx(unit * best)
        kept = (halves[0, group * GROUP : (group + 1) * GROUP] - 8) * steps[0, group]
        assert float((kept - numbers).square().sum()) == pytest.approx(off(unit * best), rel=1e-3)


@torch.inference_mode()
def test_int4_of_zeros_and_what_is_no_number() -> None:
    assert not bool(Int4Linear(torch.zeros(16, GROUP), None)(torch.ones(2, GROUP)).any())
    with pytest.raises(CorruptModel, match="not finite"):
        Int4Linear(torch.full((16, GROUP), torch.nan), None)


def test_what_int4_does_not_fit_is_kept_in_int8() -> None:
    stack = nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 10), nn.Linear(33, 16))
    assert quantize_linears(stack, "int4", CPU) == 3
    assert [type(each) for each in stack] == [Int4Linear, Int8Linear, Int8Linear]


@pytest.mark.parametrize(("quant", "device"), [("int4", "cuda"), ("int8", "mps")])
def test_what_cannot_be_computed_there_is_refused(quant: str, device: str) -> None:
    with pytest.raises(BadOption, match=f"weights in {quant} cannot be computed with on {device}"):
        quantize_linears(nn.Sequential(nn.Linear(32, 16)), quant, torch.device(device))


def test_int8_on_cuda_without_bitsandbytes_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(BadOption, match=r"pip install 'bsns\[cuda\]'"):
        quantize_linears(nn.Sequential(nn.Linear(32, 16)), "int8", torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@torch.inference_mode()
def test_int8_on_cuda() -> None:
    pytest.importorskip("bitsandbytes")
    exact = layer()
    stack = nn.Sequential(nn.Linear(256, 96))
    stack[0].load_state_dict(exact.state_dict())
    stack.to(torch.bfloat16)
    quantize_linears(stack, "int8", torch.device("cuda"))
    stack.to("cuda")
    assert stack[0].weight.dtype == torch.int8
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    x[:, [7, 100, 200]] *= 60
    assert error(stack(x.to("cuda", torch.bfloat16)).float().cpu(), exact(x)) < 0.015
