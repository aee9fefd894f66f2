"""What `bsns bench compress` reports, on what is quick to measure."""

from __future__ import annotations

import pytest
from native_stages import needs_native

from bsns.bench import compress
from bsns.bench.compress import _planted, bench_wire
from bsns.native.library import Library, native_library
from bsns.native.stage import OUTLIER
from bsns.protocol.codecs import CODECS


def test_every_codec_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "COUNTS", (1, 2048))
    monkeypatch.setattr(compress, "COLUMNS", (576, 4096))
    found, why = bench_wire(quick=True, told=lambda what: None)
    assert set(found) - {"hivemind"} == CODECS.keys() - {"raw"}
    assert bool(why) == ("hivemind" not in found)
    for codec, figures in found.items():
        if codec == "hivemind":
            continue
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
