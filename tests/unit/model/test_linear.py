"""Packed linear layers against the layers they replace."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bsns.core.blocks import BlockRange
from bsns.model import linear
from bsns.model.ends import Ends
from bsns.model.linear import PackedLinear, can_pack, pack_linears
from bsns.model.stage import Stage

torch.set_num_threads(1)
needs_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this torch has no oneDNN to pack for"
)


def close(actual: torch.Tensor, x: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within bfloat16's own rounding of the product in float64."""
    exact = x.double() @ weight_OI.double().T + (0 if bias is None else bias.double())
    error = (actual.double() - exact).abs()
    assert actual.dtype == torch.bfloat16
    assert bool((error <= exact.abs() * 2**-7 + 2**-7).all())


@needs_packing
@pytest.mark.parametrize("rows", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(48, 80, bias=bias).bfloat16()
    packed = PackedLinear(layer.weight, layer.bias)
    assert (packed.in_features, packed.out_features) == (48, 80)
    x = torch.randn(1, rows, 48).bfloat16()
    with torch.inference_mode():
        actual = packed(x)
        assert actual.shape == (1, rows, 80)
        close(actual, x, layer.weight, layer.bias)
        torch.testing.assert_close(actual, layer(x), rtol=2**-7, atol=2**-7)


@needs_packing
def test_equals_conv1d() -> None:
    torch.manual_seed(1)
    block = nn.Sequential(Conv1D(40, 24), nn.GELU(), nn.Linear(40, 8)).bfloat16()
    nn.init.normal_(block[0].bias)
    x = torch.randn(3, 24).bfloat16()
    with torch.inference_mode():
        expected = block(x)
        assert pack_linears(block) == 2
        assert [type(layer) for layer in block] == [PackedLinear, nn.GELU, PackedLinear]
        torch.testing.assert_close(block(x), expected, rtol=2**-6, atol=2**-6)


@needs_packing
def test_keeps_no_unpacked_copy() -> None:
    packed = PackedLinear(torch.ones(16, 32, dtype=torch.bfloat16), None)
    assert list(packed.parameters()) == []
    assert packed._packed.is_mkldnn


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)


def test_a_processor_without_bfloat16_is_left_its_plain_layers(tiny_model: Callable[[str], Path]) -> None:
    code = """
import sys, torch
from pathlib import Path
from bsns.core.blocks import BlockRange
from bsns.model.attention import KVCache, Segment
from bsns.model.linear import PackedLinear
from bsns.model.stage import Stage
stage = Stage(Path(sys.argv[1]), BlockRange(1, 3), dtype="bfloat16")
assert not any(isinstance(module, PackedLinear) for module in stage._layers.modules())
print(stage.run(torch.ones(2, stage.hidden_size), [Segment(KVCache(2), 0, 0, 2)]).isfinite().all().item())
"""
    command = [sys.executable, "-c", code, str(tiny_model("llama"))]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("packed_for", [1, 16])
def test_however_it_is_packed_it_computes_the_same(rows: int, packed_for: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(72, 100).bfloat16()
    monkeypatch.setattr(linear, "PACKED_FOR_ROWS", packed_for)
    packed = PackedLinear(layer.weight, layer.bias)
    x = torch.randn(rows, 72).bfloat16()
    with torch.inference_mode():
        close(packed(x), x, layer.weight, layer.bias)


@needs_packing
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_bfloat16_stage_runs_packed_layers_alone(family: str, tiny_model: Callable[[str], Path]) -> None:
    stage = Stage(tiny_model(family), BlockRange(1, 3), dtype="bfloat16")
    kinds = [type(module) for index in stage.blocks for module in stage._layers[index].modules()]
    assert nn.Linear not in kinds
    assert Conv1D not in kinds
    assert kinds.count(PackedLinear) == 2 * {"llama": 7, "gpt2": 4, "gpt_neox": 4, "phi3": 4}[family]
    ran: list[nn.Module] = []
    for index in stage.blocks:
        for module in stage._layers[index].modules():
            if isinstance(module, PackedLinear):
                module.register_forward_hook(lambda module, *_: ran.append(module))
    stage._check()
    assert len(ran) == kinds.count(PackedLinear)
    assert isinstance(Ends(tiny_model(family), dtype="bfloat16")._head, PackedLinear)


def test_a_float32_stage_is_left_as_it_is(tiny_model: Callable[[str], Path]) -> None:
    stage = Stage(tiny_model("llama"), BlockRange(1, 3), dtype="float32")
    kinds = [type(module) for module in stage._layers.modules()]
    assert PackedLinear not in kinds
    assert kinds.count(nn.Linear) == 14
