"""`bsns bench compress`: what fewer bits cost and save: on the wire, in the weights, in the cache.

Everything is measured against 16 bits in the same run. Codecs encode and decode rows of random numbers, and of such
with outlier channels, which real activations have; others' codecs do the same.
Weights are those of a Llama shape of 1.1 B; others' quantised layers compute one block's products beside ours.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bsns.bench import compress_rivals as rivals
from bsns.bench.compress_rivals import Codec, Layers, Step
from bsns.bench.emulation import hindrance
from bsns.bench.engine import SHAPES, NativeRunner, accuracy, shaped, speed, windows_of_text
from bsns.bench.first_token import bench_first_token
from bsns.bench.llama_cpp import MEASURES
from bsns.bench.machine import cpu_name
from bsns.client.prompts import Prompts
from bsns.compression import plain, rows
from bsns.core.blocks import BlockRange
from bsns.model.source import SMOLLM2, ModelSource, cache_dir, resolve
from bsns.native.families import RMS_NORM
from bsns.native.library import KINDS, Handle, Library, Matrix, Source, native_library
from bsns.native.stage import OUTLIER, NativeStage
from bsns.native.stage import Segment as NativeSegment
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.frames import Buffer

DTYPE = "bfloat16"
PARTS = ("wire", "weights", "kv", "ttft")
COUNTS = (1, 16, 256, 2048)
COLUMNS = (576, 2048, 4096)
OUTLIERS = (7, 200, 401)
"""Channels that are `OUTLIER_SIZE` times as large as the others."""
OUTLIER_SIZE = 60.0
FORMATS = {"none": "bf16", "int8": "int8", "int4": "int4"}
NO_NORM = 0
"""The address of no weights: nothing is normed."""
LINEAR_ROWS = (1, 16)

Told = Callable[[str], None]
Floats = NDArray[np.float32]


async def bench_compress(parts: Sequence[str], *, threads: int, quick: bool, told: Told) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md."""
    torch.set_num_threads(threads)
    library = native_library()
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    if "wire" in parts:
        figures["wire"], missing = bench_wire(quick, told)
        left_out |= missing
    if isinstance(library, str):
        left_out |= {part: library for part in ("weights", "kv") if part in parts}
    else:
        if "weights" in parts:
            figures["weights"] = bench_weights(library, threads, quick, told)
            figures["weights"]["block_linears"], missing = bench_linears(library, threads, quick, told)
            left_out |= missing
        if "kv" in parts:
            figures["kv"] = {"int8": bench_kv(threads, told)}
    if "ttft" in parts:
        if (problem := hindrance()) is None:
            figures |= await bench_first_token(quick, told)
        else:
            left_out["ttft"] = problem
    return {
        **figures,
        "left_out": left_out,
        "kernels": library if isinstance(library, str) else library.kernels[0],
        "threads": threads,
        "quick": quick,
        "cpu": cpu_name(),
        "load_before": round(os.getloadavg()[0], 2),
    }


# ---- on the wire ----------------------------------------------------------------------------------------------------


def bench_wire(quick: bool, told: Told) -> tuple[dict[str, Any], dict[str, str]]:
    """Every codec on every shape, and others' on the same; with why which of them are missing."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for codec in (codec for codec in CODECS if codec != RAW):
        told(f"wire: {codec}")

        def there_and_back(data: bytearray, shape: tuple[int, int], codec: str = codec) -> tuple[int, Buffer]:
            coded = rows.encode(codec, data, DTYPE, shape[1])
            return memoryview(coded).nbytes, rows.decode(codec, coded, DTYPE, shape[1])

        found[codec] = _measured(there_and_back, quick)
    for name, made in rivals.CODECS.items():
        told(f"wire: {name}'s codec")
        try:
            found[name] = _measured(made(), quick)
        except Exception as error:  # noqa: BLE001  others' packages raise anything: it is left out, and that says why
            missing[name] = rivals.why_not(error)
    return found, missing


def _measured(there_and_back: Codec, quick: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for columns in COLUMNS:
        for count in COUNTS:
            data = bytearray(plain.in_dtype(activations(count, columns), DTYPE).tobytes())
            nbytes, _ = there_and_back(data, (count, columns))
            times_s = []
            for _ in range(3 if quick or count > 256 else 30):
                started_s = time.perf_counter()
                there_and_back(data, (count, columns))
                times_s.append(time.perf_counter() - started_s)
            figures.setdefault("us", {}).setdefault(str(columns), {})[str(count)] = round(min(times_s) * 1e6, 1)
            figures.setdefault("bytes", {}).setdefault(str(columns), {})[str(count)] = round(nbytes / len(data), 4)
    figures["bytes_ratio"] = figures["bytes"]["576"]["1"]
    figures["us_1"], figures["us_2048"] = figures["us"]["576"]["1"], figures["us"]["4096"]["2048"]
    for name, values in (("rel_err", activations(64, 576)), ("rel_err_outliers", activations(64, 576, OUTLIER_SIZE))):
        data = bytearray(plain.in_dtype(values, DTYPE).tobytes())
        exact = plain.numbers(data, DTYPE, (64, 576))
        back = plain.numbers(there_and_back(data, (64, 576))[1], DTYPE, (64, 576))
        figures[name] = _short(float(np.linalg.norm(back - exact) / np.linalg.norm(exact)))
    return figures


def activations(count: int, columns: int, outliers: float = 1.0) -> Floats:
    """Normal numbers, of which some channels are larger."""
    values = np.random.default_rng(count * columns).standard_normal((count, columns)).astype(np.float32)
    values[:, OUTLIERS] *= outliers
    return values


# ---- weights --------------------------------------------------------------------------------------------------------


def bench_weights(library: Library, threads: int, quick: bool, told: Told) -> dict[str, Any]:
    """The native executor on the 1.1 B shape: what weights take, how fast it decodes, how far its logits are off."""
    scratch = cache_dir() / "bench"
    scratch.mkdir(parents=True, exist_ok=True)
    source = shaped("1.1b", scratch)
    taken: dict[str, dict[str, list[float]]] = {name: {"1": [], "4": [], "16": []} for name in FORMATS}
    figures: dict[str, dict[str, Any]] = {}
    runners: dict[str, NativeRunner] = {}
    try:
        for name, form in FORMATS.items():
            told(f"weights: loading {name}")
            before = _resident()
            runners[name] = NativeRunner(source, form, threads)
            grown = _resident() - before
            figures[name] = {"weight_mb": round(runners[name].stage_bytes / 2**20), "rss_mb": round(grown / 2**20)}
        for number in range(2 if quick else 6):
            told(f"weights: round {number}")
            for measure, speeds in ((m, {n: t[m] for n, t in taken.items()}) for m in ("1", "4", "16")):
                for name, runner in runners.items():
                    tokens_per_s = speed(runner, MEASURES[measure], 0.2 if quick else 1.0)
                    if number:  # the first warms up
                        speeds[name].append(tokens_per_s)
    finally:
        for runner in runners.values():
            runner.close()
    whole = figures["none"]["weight_mb"]
    for name, found in figures.items():
        found["rss_ratio"] = round(found["weight_mb"] / whole, 3)
        for measure, speeds_of in taken[name].items():
            found[f"tps_{measure}"] = round(statistics.median(speeds_of), 2)
            found[f"tps_{measure}_ratio"] = round(
                statistics.median(a / b for a, b in zip(speeds_of, taken["none"][measure], strict=True)), 2
            )
    told("weights: accuracy")
    errors = accuracy(source, list(FORMATS.values()), threads, perplexity=False)["logit_error"]
    for name, form in FORMATS.items():
        figures[name]["rel_err"] = errors[form]
    figures["int8"]["rel_err_outliers"] = _planted(library, OUTLIER)
    figures["int8"]["rel_err_outliers_plain"] = _planted(library, 0.0)
    return figures


def _resident() -> int:
    """Resident bytes of this process that no file stands behind."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def _planted(library: Library, outlier: float) -> float:
    """How far one int8 product is off where three columns of what comes are `OUTLIER_SIZE` times as large."""
    size, count = 2048, 16
    draw = np.random.default_rng(1)
    weights = torch.from_numpy((draw.standard_normal((size, size)) / math.sqrt(size)).astype(np.float32))
    x = torch.from_numpy(activations(count, size, OUTLIER_SIZE))
    with ExitStack() as stack:
        pool = stack.enter_context(closing(library.pool(1)))
        product = _product(library, pool, _packed(library, stack, "int8", weights), x, outlier)
    return _error([product], [x @ weights.T])


def _packed(library: Library, stack: ExitStack, kind: str, weights: torch.Tensor) -> Matrix:
    """Weights (outputs, inputs) in float32, packed."""
    outputs, inputs = weights.shape
    memory = stack.enter_context(closing(library.memory(library.matrix_bytes(kind, outputs, inputs))))
    matrix = Matrix(KINDS[kind], outputs, inputs, memory.address)
    source = Source(weights.data_ptr(), KINDS["float32"], outputs, inputs, inputs, 1)
    library.pack(matrix, source, 0, 1, inputs, inputs)
    return matrix


def _product(library: Library, pool: Handle, matrix: Matrix, x: torch.Tensor, outlier: float) -> torch.Tensor:
    y = torch.empty(len(x), matrix.rows)
    library.project(
        pool,
        matrix,
        RMS_NORM,
        NO_NORM,
        epsilon=0.0,
        outlier=outlier,
        rows=len(x),
        source=x.data_ptr(),
        kind="float32" if x.dtype == torch.float32 else DTYPE,
        target=y.data_ptr(),
    )
    return y


def _error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """In the Euclidean norm, of all together."""
    off = sum(float((a.float() - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return _short(math.sqrt(off / sum(float(b.square().sum()) for b in exact)))


# ---- one block's products, and others' ------------------------------------------------------------------------------


@torch.no_grad()
def bench_linears(
    library: Library, threads: int, quick: bool, told: Told, sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The linear layers of one block of the 1.1 B shape, in our formats and others'; with why which are missing.

    All have the same bfloat16 weights and inputs and compute one layer after another. `sizes`: (outputs, inputs).
    """
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(size, generator=draw).mul_(0.02).bfloat16() for size in sizes or block_sizes("1.1b")]
    inputs = {count: _inputs(weights, count) for count in LINEAR_ROWS}
    given = {"rel_err": inputs[LINEAR_ROWS[-1]], "rel_err_outliers": _inputs(weights, LINEAR_ROWS[-1], OUTLIER_SIZE)}
    exact = {key: [x.float() @ w.float().T for x, w in zip(xs, weights, strict=True)] for key, xs in given.items()}
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    steps: dict[str, tuple[str, Step]] = {}

    def enter(name: str, rival_of: str, step: Step, nbytes: int) -> None:
        step(inputs[1])  # a compiler compiles it for each number of rows
        errors = {key: _error(step(xs), exact[key]) for key, xs in given.items()}
        found[name], steps[name] = {"weight_mb": round(nbytes / 2**20, 1), **errors}, (rival_of, step)

    with ExitStack() as stack:
        pool = stack.enter_context(closing(library.pool(threads)))
        for form in FORMATS:
            told(f"weights: one block's layers, ours {form}")
            enter(f"ours_{form}", f"ours_{form}", *_our_linears(library, pool, stack, form, weights))
        for name, (form, made) in rivals.LINEARS.items():
            told(f"weights: one block's layers, {name}")
            try:
                layers = Layers(weights)
                step = made(layers)
                enter(name, f"ours_{form}", step, layers.nbytes)
            except Exception as error:  # noqa: BLE001  as on the wire
                missing[name] = rivals.why_not(error)
        for count, xs in inputs.items():
            told(f"weights: one block's layers, {count} rows")
            times_s: dict[str, list[float]] = {name: [] for name in steps}
            # one step each, in turns: every one finds the caches full of others' weights, as in a model of many blocks
            for _ in range(5 if quick else 30):
                for name, (_, step) in steps.items():
                    started_s = time.perf_counter()
                    step(xs)
                    times_s[name].append(time.perf_counter() - started_s)
            for name, (ours, _) in steps.items():
                ratios = (a / b for a, b in zip(times_s[name], times_s[ours], strict=True))
                found[name][f"us_token_{count}"] = round(statistics.median(times_s[name]) / count * 1e6, 1)
                found[name][f"times_ours_{count}"] = round(statistics.median(ratios), 2)
    return found, missing


def block_sizes(shape: str) -> list[tuple[int, int]]:
    """Outputs and inputs of one block's linear layers: queries, keys, values, out, gate, up, down."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    hidden, between, heads, kv_heads = (SHAPES[shape][name] for name in names)
    kv = hidden // heads * kv_heads
    return [(out, hidden) for out in (hidden, kv, kv, hidden, between, between)] + [(hidden, between)]


def _inputs(weights: Sequence[torch.Tensor], count: int, outliers: float = 1.0) -> list[torch.Tensor]:
    return [torch.from_numpy(activations(count, weight.shape[1], outliers)).bfloat16() for weight in weights]


def _our_linears(
    library: Library, pool: Handle, stack: ExitStack, form: str, weights: Sequence[torch.Tensor]
) -> tuple[Step, int]:
    """The products as the native executor computes them, and the bytes of the packed weights."""
    kind, outlier = (DTYPE, 0.0) if form == "none" else (form, OUTLIER)
    matrices = [_packed(library, stack, kind, weight.float()) for weight in weights]

    def step(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [_product(library, pool, matrix, x, outlier) for matrix, x in zip(matrices, xs, strict=True)]

    return step, sum(library.matrix_bytes(kind, *weight.shape) for weight in weights)


# ---- the cache ------------------------------------------------------------------------------------------------------


def bench_kv(threads: int, told: Told) -> dict[str, float]:
    """SmolLM2's perplexity with keys and values in int8, against bfloat16, the rest in bfloat16."""
    source = resolve(SMOLLM2)
    losses = {}
    for cache in ("same", "int8"):
        told(f"kv: perplexity with {'bfloat16' if cache == 'same' else cache}")
        losses[cache] = _loss(source, cache, threads)
    whole, short = source.kv_bytes_per_token_per_block(2), source.kv_bytes_per_token_per_block(2, "int8")
    return {
        "bytes_ratio": round(short / whole, 4),
        "ppl_ratio": round(math.exp(losses["int8"] - losses["same"]), 5),
    }


def _loss(source: ModelSource, cache: str, threads: int) -> float:
    """Mean cross entropy over the text, read 32 tokens at a time, so that most of it is read from the cache."""
    from bsns.model.ends import Ends

    ends = Ends(source.path, dtype=DTYPE)
    blocks = BlockRange(0, source.block_count)
    stage = NativeStage(source.checkpoint, blocks, dtype=DTYPE, cache=cache, threads=threads)
    losses = []
    with closing(stage):
        for tokens in windows_of_text(Prompts(source.path).encode):
            with closing(stage.open(len(tokens))) as held:
                hidden = ends.embed(torch.tensor(tokens), torch.arange(len(tokens))).view(torch.uint8).numpy()
                output = b"".join(
                    stage.run([NativeSegment(held, start, len(part))], part.tobytes())
                    for start in range(0, len(tokens), 32)
                    if len(part := hidden[start : start + 32])
                )
            logits = ends.logits(torch.frombuffer(bytearray(output), dtype=torch.bfloat16).view(len(tokens), -1))
            losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))))
    return statistics.mean(losses)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
