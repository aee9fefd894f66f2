"""llama.cpp, where it is present: a build of it that was tried, and how many tokens per second it makes.

A build is the programs `llama-bench` and `llama-batched-bench`. Each measurement is a process of its own that loads
the file, warms up and measures once, so that whoever compares can take turns with it. llama.cpp's threads wait for one
another spinning: on a machine that does something else besides, it loses more than we do, and nothing can be compared.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from bsns.bench.llama_gguf import LlamaShape, made_up_gguf
from bsns.core.errors import BadOption

VARIABLE = "BSNS_LLAMA_CPP"
"""Names the directory of a build: where the programs are, or what holds them in `bin` or `build/bin`."""
_PLACES = (".", "bin", "build/bin")
_PREFILLING, _DECODING = "llama-bench", "llama-batched-bench"

# The slowest of what is compared takes half a minute.
_ROUND_DEADLINE_S = 900.0
_TRIAL_DEADLINE_S = 60.0
# The smallest matrices that AMX takes are 32 × 32, and batches of one take another way (ggml-cpu/amx/amx.cpp, mmq.cpp).
_TRIAL_SHAPE = LlamaShape(layers=1, hidden=64, heads=2, kv_heads=1, head_size=32, intermediate=64, vocabulary=64)
_TRIAL_FORMATS = ("float32", "bfloat16", "q8_0", "q4_0")
_AMX_LAYOUT = "AMX model buffer size"
# llama-batched-bench may end before its logging thread has written the figures (seen with build 11434 on a busy
# machine: one run of a tiny model in three).
_ATTEMPTS = 3
# What in the caller's environment would change how llama.cpp runs.
_MEDDLING = ("OMP_", "GOMP_", "KMP_", "GGML_", "LLAMA_")


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A build that ran every format. `amx_formats` are those whose matrices it lays out for AMX."""

    directory: Path
    build: str
    """llama.cpp's build number and commit, as the build knows them."""
    amx_formats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Absent:
    """No llama.cpp to compare with, and why, in a line."""

    reason: str


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of that many tokens."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Decode:
    """One token after the other for each of `sequences`: each has keys and values of its own, around `context_tokens`
    of them."""

    sequences: int
    context_tokens: int = 128


Measure = Prefill | Decode
MEASURES: dict[str, Measure] = {
    "1": Decode(1),
    "4": Decode(4),
    "16": Decode(16),
    "64": Decode(64),
    "prefill_128": Prefill(128),
    "prefill_1024": Prefill(1024),
}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How llama.cpp is set."""

    flash_attention: bool
    batch_tokens: int = 2048
    micro_batch_tokens: int = 512


def best_tuning(measure: Measure) -> Tuning:
    """What llama.cpp is fastest with on a processor.

    benchmarks/results/llama_cpp_2026-11-26.md: flash attention gains a sixth on prompts and costs two fifths on 16
    sequences; micro-batches of 256 gain a seventh over 512 on prompts of 1024.
    """
    match measure:
        case Prefill():
            return Tuning(flash_attention=True, micro_batch_tokens=256)
        case Decode():
            return Tuning(flash_attention=False)
        case _:
            assert_never(measure)


def find_llama_cpp(scratch: Path, directory: Path | None = None) -> LlamaCpp | Absent:
    """The build in `directory`, else in `$BSNS_LLAMA_CPP`, once it has run tiny models that are made in `scratch`.

    A second. A build that crashes on one of the formats is Absent, and its reason says on which.
    """
    named = str(directory) if directory is not None else os.environ.get(VARIABLE, "")
    if not named:
        return Absent(f"no llama.cpp is named: set {VARIABLE} to a directory with {_PREFILLING} and {_DECODING}")
    for place in _PLACES:
        found = (Path(named).expanduser() / place).absolute()
        if all(os.access(found / program, os.X_OK) for program in (_PREFILLING, _DECODING)):
            return _tried(found, scratch)
    return Absent(f"{named} holds no {_PREFILLING} and {_DECODING}: build both, or correct {VARIABLE}")


def tokens_per_s(llama: LlamaCpp, file: Path, measure: Measure, *, threads: int, tuning: Tuning | None = None) -> float:
    """One round of one measurement of a GGUF file, with `best_tuning` unless another is given.

    Raises BadOption where llama.cpp fails, with its last words.
    """
    command = arguments(measure, file, threads, tuning or best_tuning(measure))
    for _ in range(_ATTEMPTS):
        said, _ = _run(llama.directory, command, _ROUND_DEADLINE_S)
        if said.strip():
            return speed(measure, said)
    raise BadOption(f"llama.cpp in {llama.directory} wrote no figures, {_ATTEMPTS} times over; use another build")


def speeds(llama: LlamaCpp, file: Path, *, threads: int, rounds: int) -> dict[str, float]:
    """Tokens per second by the names of MEASURES: medians over rounds in which the measurements take turns."""
    taken: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(rounds):
        for name, measure in MEASURES.items():
            taken[name].append(tokens_per_s(llama, file, measure, threads=threads))
    return {name: statistics.median(values) for name, values in taken.items()}


def arguments(measure: Measure, file: Path, threads: int, tuning: Tuning, servers: Sequence[str] = ()) -> list[str]:
    """The command of one round: a program's name and its options. `servers` (host:port) take equal parts of the model,
    where there are any."""
    common = ["-m", str(file), "-t", str(threads), "-fa", "on" if tuning.flash_attention else "off"]
    common += ["-b", str(tuning.batch_tokens), "-ub", str(tuning.micro_batch_tokens)]
    if servers:
        common += ["--rpc", ",".join(servers), "-ngl", "99", "-ts", ",".join("1" for _ in servers), "-fit", "off"]
    match measure:
        case Prefill(tokens):
            return [_PREFILLING, *common, "-p", str(tokens), "-n", "0", "-r", "1", "-o", "json"]
        case Decode(sequences, context_tokens):
            # Enough for a second or so, whatever is decoded together, and half of them before the context is reached.
            steps = max(16, 64 // sequences)
            prompt = max(1, context_tokens - steps // 2)
            # llama.cpp rounds a sequence's share of the cache up to 256 tokens.
            room = sequences * -(-(prompt + steps) // 256) * 256
            # -pps computes the prompt once and copies its keys and values to every sequence's own share.
            shape = ["-npp", str(prompt), "-ntg", str(steps), "-npl", str(sequences), "-pps", "-c", str(room)]
            return [_DECODING, *common, "-tb", str(threads), *shape, "--output-format", "jsonl"]
        case _:
            assert_never(measure)


def speed(measure: Measure, said: str) -> float:
    """Tokens per second in what the program of `arguments` wrote. Raises BadOption where it does not say it."""
    try:
        match measure:
            case Prefill(tokens):
                (row,) = json.loads(said)
                measured, found = row["n_prompt"] == tokens, float(row["avg_ts"])
            case Decode(sequences):
                row = json.loads(said)
                measured, found = row["pl"] == sequences, float(row["speed_tg"])
            case _:
                assert_never(measure)
    except (ValueError, KeyError, TypeError) as error:
        raise BadOption(f"llama.cpp's figures cannot be read: {said.strip()[-100:]!r}; use another build") from error
    if not measured or not 0 < found < float("inf"):
        raise BadOption(f"llama.cpp measured something else than {measure}: {said.strip()[-100:]!r}; use another build")
    return found


def _tried(directory: Path, scratch: Path) -> LlamaCpp | Absent:
    build, amx = "", []
    for form in _TRIAL_FORMATS:
        file = made_up_gguf(_TRIAL_SHAPE, form, scratch)
        try:
            prefill, decode = (arguments(m, file, 1, best_tuning(m)) for m in (Prefill(32), Decode(2)))
            said, told = _run(directory, [*prefill, "-v"], _TRIAL_DEADLINE_S)
            speed(Prefill(32), said)
            _run(directory, decode, _TRIAL_DEADLINE_S)
        except BadOption as error:
            return Absent(f"llama.cpp does not run on {form}: {error}")
        if _AMX_LAYOUT in told:
            amx.append(form)
        row = json.loads(said)[0]
        build = f"{row.get('build_number', 'unknown')} ({row.get('build_commit', 'unknown')})"
    return LlamaCpp(directory, build, tuple(amx))


def _run(directory: Path, command: list[str], deadline_s: float) -> tuple[str, str]:
    """What the program wrote to its output and its error output. Raises BadOption if it fails or does not end."""
    program = directory / command[0]
    try:
        done = subprocess.run(
            [str(program), *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env=environment(os.environ),
        )
    except OSError as error:
        raise BadOption(f"{program} cannot be started ({error.strerror}); build it on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise BadOption(f"{program} did not end within {deadline_s:.0f} s; use a smaller model") from error
    if done.returncode:
        raise BadOption(_failure(program, done.returncode, done.stderr))
    return done.stdout, done.stderr


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What llama.cpp's programs are given of an environment."""
    return {name: value for name, value in inherited.items() if not name.startswith(_MEDDLING)}


def _failure(program: Path, status: int, told: str) -> str:
    if status < 0:
        killed = signal.Signals(-status).name
        return f"{program} was ended by {killed}; build it on this machine, as docs/benchmarks.md says"
    last = next((line.strip() for line in reversed(told.splitlines()) if line.strip()), f"status {status}")
    return f"{program} failed: {last[:200]}; build it on this machine, as docs/benchmarks.md says"
