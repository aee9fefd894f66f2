"""llama.cpp as it is found, asked and understood; no llama.cpp is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bsns.bench.llama_cpp import (
    MEASURES,
    VARIABLE,
    Absent,
    Decode,
    LlamaCpp,
    Measure,
    Prefill,
    Tuning,
    arguments,
    best_tuning,
    find_llama_cpp,
    speed,
    speeds,
    tokens_per_s,
)
from bsns.core.errors import BadOption

# What build 11434 wrote, shortened.
PREFILLED = """[
  {
    "build_commit": "unknown",
    "build_number": 11434,
    "n_threads": 2,
    "flash_attn": 1,
    "n_prompt": 128,
    "n_gen": 0,
    "avg_ns": 512000000,
    "avg_ts": 250.000000,
    "samples_ns": [ 512000000 ],
    "samples_ts": [ 250 ]
  }
]
"""
DECODED = (
    '{"n_kv_max": 1024, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "is_pp_shared": 1, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": 120, "tg": 16, "pl": 4, "n_kv": 544, "t_pp": 8.307782, '
    '"speed_pp": 14.444288, "t_tg": 0.500000, "speed_tg": 128.000000, "t": 8.807782, "speed": 20.890482}\n\n'
)
BUILD_11434 = f"""\
case "$*" in
  *-ntg*) printf '%s' '{DECODED.replace('"pl": 4', '"pl": 2').strip()}' ;;
  *) printf '%s' '[{{"build_number": 11434, "build_commit": "unknown", "n_prompt": 32, "avg_ts": 5.0}}]' ;;
esac
case "$*" in *q8_0*-v) echo 'load_tensors:          AMX model buffer size =     0.03 MiB' >&2 ;; esac
"""


def build_of(folder: Path, script: str) -> Path:
    """A build whose programs are that shell script."""
    (folder / "build" / "bin").mkdir(parents=True)
    for name in ("llama-bench", "llama-batched-bench"):
        program = folder / "build" / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}")
        program.chmod(0o755)
    return folder


def absent(found: LlamaCpp | Absent) -> str:
    assert isinstance(found, Absent)
    assert "\n" not in found.reason
    return found.reason


def test_figures_are_read() -> None:
    assert speed(Prefill(128), PREFILLED) == 250.0
    assert speed(Decode(4), DECODED) == 128.0


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (Prefill(128), ""),
        (Prefill(128), "[]"),
        (Prefill(128), "[{}]"),
        (Prefill(128), "null"),
        (Prefill(128), PREFILLED[:100]),
        (Prefill(1024), PREFILLED),
        (Prefill(128), PREFILLED.replace("250.000000", "nan")),
        (Prefill(128), PREFILLED.replace("250.000000", "0.0")),
        (Decode(4), ""),
        (Decode(4), "| PP | TG |"),
        (Decode(4), DECODED + DECODED),
        (Decode(16), DECODED),
        (Decode(4), DECODED.replace("128.000000", "inf")),
    ],
)
def test_what_is_no_figure_is_an_error(measure: Measure, said: str) -> None:
    with pytest.raises(BadOption, match=r"figures|something else"):
        speed(measure, said)


def test_each_measurement_is_one_round_of_one_shape() -> None:
    program, *options = arguments(Prefill(1024), Path("m.gguf"), 2, Tuning(flash_attention=True))
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert program == "llama-bench"
    assert (given["-p"], given["-n"], given["-r"], given["-t"], given["-o"]) == ("1024", "0", "1", "2", "json")
    assert (given["-fa"], given["-b"], given["-ub"]) == ("on", "2048", "512")
    program, *options = arguments(Decode(64), Path("m.gguf"), 2, Tuning(flash_attention=False))
    assert program == "llama-batched-bench"
    options.remove("-pps")
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert (given["-t"], given["-tb"], given["-npl"], given["-fa"]) == ("2", "2", "64", "off")


@pytest.mark.parametrize("measure", [m for m in MEASURES.values() if isinstance(m, Decode)])
def test_decoding_is_centred_on_its_context_and_fits_the_cache(measure: Decode) -> None:
    options = arguments(measure, Path("m.gguf"), 2, best_tuning(measure))
    prompt, steps, room = (int(options[options.index(name) + 1]) for name in ("-npp", "-ntg", "-c"))
    assert prompt + steps / 2 == measure.context_tokens
    assert room >= measure.sequences * (prompt + steps)


def test_no_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"set {VARIABLE}" in absent(find_llama_cpp(tmp_path))


def test_a_directory_without_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    assert "nowhere holds no llama-bench and llama-batched-bench" in absent(find_llama_cpp(tmp_path))
    (tmp_path / "llama-bench").touch()
    assert "holds no llama-bench" in absent(find_llama_cpp(tmp_path, tmp_path))


def test_a_build_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(build_of(tmp_path / "llama", BUILD_11434)))
    found = find_llama_cpp(tmp_path / "scratch")
    assert found == LlamaCpp(tmp_path / "llama" / "build" / "bin", "11434 (unknown)", ("q8_0",))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('case "$*" in *q8_0*) kill -ILL $$ ;; esac\n' + BUILD_11434, "does not run on q8_0: .* ended by SIGILL"),
        ('case "$*" in *-ntg*) kill -SEGV $$ ;; esac\n' + BUILD_11434, "does not run on float32: .* ended by SIGSEGV"),
        ("echo 'error: invalid parameter' >&2; exit 1", "failed: error: invalid parameter"),
        ("exit 3", "failed: status 3"),
        ("echo hello", "figures cannot be read: 'hello'"),
    ],
)
def test_a_broken_build_is_absent(tmp_path: Path, script: str, reason: str) -> None:
    assert re.search(reason, absent(find_llama_cpp(tmp_path / "scratch", build_of(tmp_path / "llama", script))))


def test_a_program_for_another_machine_is_absent(tmp_path: Path) -> None:
    folder = build_of(tmp_path / "llama", "")
    (folder / "build" / "bin" / "llama-bench").write_bytes(b"\x7fELF not for us")
    assert "cannot be started" in absent(find_llama_cpp(tmp_path / "scratch", folder))


def test_figures_that_were_lost_are_measured_again(tmp_path: Path) -> None:
    once = f"[ -e {tmp_path}/ran ] && printf '%s' '{DECODED.strip()}'; echo run >> {tmp_path}/ran\n"
    llama = LlamaCpp(build_of(tmp_path / "llama", once) / "build" / "bin", "", ())
    assert tokens_per_s(llama, Path("m.gguf"), Decode(4), threads=1) == 128.0
    assert (tmp_path / "ran").read_text().count("run") == 2


def test_figures_that_never_come_are_an_error(tmp_path: Path) -> None:
    llama = LlamaCpp(build_of(tmp_path / "llama", "true") / "build" / "bin", "", ())
    with pytest.raises(BadOption, match="no figures"):
        tokens_per_s(llama, Path("m.gguf"), Decode(4), threads=1)


def test_the_callers_thread_settings_do_not_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = f"echo \"${{OMP_NUM_THREADS-unset}}\" > {tmp_path}/threads; printf '%s' '{DECODED.strip()}'\n"
    llama = LlamaCpp(build_of(tmp_path / "llama", script) / "build" / "bin", "", ())
    tokens_per_s(llama, Path("m.gguf"), Decode(4), threads=2)
    assert (tmp_path / "threads").read_text() == "unset\n"


def test_medians_over_rounds_that_take_turns(tmp_path: Path) -> None:
    # Each run is one token per second faster than the one before.
    script = f"""\
echo run >> {tmp_path}/ran; n=$(wc -l < {tmp_path}/ran)
while [ $# -gt 0 ]; do case "$1" in -npl) pl=$2 ;; -p) p=$2 ;; esac; shift; done
if [ -n "$pl" ]; then echo "{{\\"pl\\": $pl, \\"speed_tg\\": $n}}"; exit; fi
echo "[{{\\"n_prompt\\": $p, \\"avg_ts\\": $n}}]"
"""
    llama = LlamaCpp(build_of(tmp_path / "llama", script) / "build" / "bin", "", ())
    found = speeds(llama, Path("m.gguf"), threads=1, rounds=3)
    assert found == {name: first + len(MEASURES) for first, name in enumerate(MEASURES, start=1)}
    assert json.loads(json.dumps(found)) == found
