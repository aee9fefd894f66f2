"""What `bsns bench compress` reports, on what is quick to measure."""

from __future__ import annotations

import pytest
import torch
from native_stages import needs_native

from bsns.bench import compress
from bsns.bench import compress_rivals as rivals
from bsns.bench.compress import _planted, bench_linears, bench_wire, block_sizes
from bsns.bench.compress_rivals import Layers, Step
from bsns.native.library import Library, native_library
from bsns.native.stage import OUTLIER
from bsns.protocol.codecs import CODECS


def test_every_codec_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "COUNTS", (1, 2048))
    monkeypatch.setattr(compress, "COLUMNS", (576, 4096))
    found, missing = bench_wire(quick=True, told=lambda what: None)
    assert found.keys() | missing.keys() == (CODECS.keys() - {"raw"}) | rivals.CODECS.keys()
    assert not found.keys() & missing.keys()
    for codec in CODECS.keys() - {"raw"}:
        figures = found[codec]
        assert figures["us_1"] > 0
        assert figures["us_2048"] > figures["us_1"]
        assert figures["bytes_ratio"] == pytest.approx(CODECS[codec].row_bytes(576, "bfloat16") / 1152, abs=1e-4)
        assert figures["rel_err"] <= CODECS[codec].error_bound(576, "bfloat16")
    assert 3 * found["int8-rot"]["rel_err_outliers"] <= found["int8"]["rel_err_outliers"]


@needs_native
def test_outliers_kept_apart_cost_int8_nothing() -> None:
    library = native_library()
    assert isinstance(library, Library)
    assert _planted(library, OUTLIER) <= 1e-2 < _planted(library, 0.0)


@needs_native
def test_linear_layers_are_compared_and_a_rival_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(layers: Layers) -> Step:
        raise ModuleNotFoundError("No module named 'their'", name="their")

    def broken(layers: Layers) -> Step:
        raise AssertionError("not on CPUs\nsecond line")

    theirs = {"torch_bf16": rivals.LINEARS["torch_bf16"], "missing": ("int8", missing), "broken": ("int4", broken)}
    monkeypatch.setattr(rivals, "LINEARS", theirs)
    library = native_library()
    assert isinstance(library, Library)
    sizes = [(576, 576), (192, 576)]
    found, why = bench_linears(library, 1, True, lambda what: None, sizes)
    assert why == {"missing": "needs their", "broken": "AssertionError: not on CPUs"}
    assert found.keys() == {"ours_none", "ours_int8", "ours_int4", "torch_bf16"}
    assert found["torch_bf16"]["weight_mb"] == round(768 * 576 * 2 / 2**20, 1)
    bounds = {"ours_none": 1e-5, "torch_bf16": 4e-3, "ours_int8": 2e-2, "ours_int4": 0.15}
    for name, bound in bounds.items():
        figures = found[name]
        assert max(figures["rel_err"], figures["rel_err_outliers"]) <= bound
        assert min(figures["us_token_1"], figures["us_token_16"], figures["times_ours_1"], figures["times_ours_16"]) > 0


def test_a_block_of_the_shape_has_seven_layers() -> None:
    sizes = block_sizes("1.1b")
    assert sum(outputs * inputs for outputs, inputs in sizes) == 2048 * (2 * 2048 + 2 * 256 + 3 * 5632)
    assert Layers([torch.zeros(size) for size in sizes]).nbytes == 4 * 2048 * (2 * 2048 + 2 * 256 + 3 * 5632)
