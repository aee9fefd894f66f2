"""`bsns bench engine`: what computes a stage, side by side: the native executor, the torch one, the model library's own
model, and llama.cpp where it is present.

Formats are compared with their like (bfloat16 with BF16, int8 with Q8_0, int4 with Q4_0), with the same weights and the
same number of threads, in turns, round after round; the memory's read bandwidth is measured in the same rounds. Speeds
are those of whole models: blocks, last norm and head.
"""

from __future__ import annotations

import gc
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from bsns.bench.llama_cpp import MEASURES, Absent, Decode, LlamaCpp, Measure, Prefill, find_llama_cpp, tokens_per_s
from bsns.bench.llama_gguf import checkpoint_gguf
from bsns.bench.machine import cpu_name
from bsns.client.prompts import Prompts
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.model.attention import KVCache
from bsns.model.attention import Segment as TorchSegment
from bsns.model.ends import Ends
from bsns.model.source import SMOLLM2, ModelSource, cache_dir, resolve
from bsns.model.stage import Stage, quiet_library
from bsns.model.tensors import to_memory
from bsns.native.architecture import NotNative
from bsns.native.library import Library, native_library
from bsns.native.projection import Projection
from bsns.native.stage import NativeStage, Segment

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Llama shapes whose weights are drawn on the spot: SmolLM2-135M's and TinyLlama-1.1B's."""
MODELS = (*SHAPES, SMOLLM2)
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
LIKE = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
"""llama.cpp's format that is compared with each."""
_GGUF = {"f32": "float32", "bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}

CONTEXT = 128
"""Tokens that a sequence has when its decoding is timed."""
PROMPT_ROWS = 512
"""Prompt tokens in a call, as many as llama.cpp takes."""
BANDWIDTH_BYTES = 512 << 20
WINDOW, WINDOWS = 512, 8
"""Tokens of text that a perplexity is taken over, at a time and how often."""

Told = Callable[[str], None]


class Runner(Protocol):
    """Something that computes a whole model."""

    weight_bytes: int
    """Read for one step."""

    def run(self, measure: Measure) -> None:
        """One step, or one prompt."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Samples:
    """Tokens per second by measure, before medians are taken."""

    speeds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    shares: list[float] = field(default_factory=list)
    """Of the read bandwidth, at batch 1."""

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 2) for name, values in self.speeds.items() if values}


def bench_engine(
    models: Sequence[str], formats: Sequence[str], *, threads: int, rounds: int, least_s: float, told: Told
) -> dict[str, Any]:
    """Measure and report; keys as in docs/benchmarks.md. A measurement lasts `least_s` at least."""
    torch.set_num_threads(threads)
    scratch = cache_dir() / "bench"
    scratch.mkdir(parents=True, exist_ok=True)
    library = native_library()
    llama = find_llama_cpp(scratch)
    figures: dict[str, Any] = {}
    for model in models:
        told(f"{model}: preparing the model")
        source = shaped(model, scratch)
        figures[model] = _bench_model(source, formats, library, llama, scratch, threads, rounds, least_s, told)
    return {
        **figures,
        "native_kernels": library if isinstance(library, str) else library.kernels[0],
        "llama_cpp_build": llama.reason if isinstance(llama, Absent) else f"{llama.build}, AMX for {llama.amx_formats}",
        "threads": threads,
        "rounds": rounds,
        "cpu": cpu_name(),
    }


def _bench_model(
    source: ModelSource,
    formats: Sequence[str],
    library: Library | str,
    llama: LlamaCpp | Absent,
    scratch: Path,
    threads: int,
    rounds: int,
    least_s: float,
    told: Told,
) -> dict[str, Any]:
    found: dict[str, Any] = {name: {} for name in ("native", "torch", "hf", "llama_cpp", "bandwidth_share", "ratio")}
    bandwidths: list[float] = []
    for form in formats:
        with _runners(source, form, library, threads) as runners:
            file = None
            if isinstance(llama, LlamaCpp):
                told(f"{source.name} {form}: writing the model for llama.cpp")
                file = checkpoint_gguf(source.checkpoint, _GGUF[LIKE[form]], scratch)
            taken: dict[str, Samples] = {name: Samples() for name in (*runners, *(["llama_cpp"] if file else []))}
            for number in range(rounds + 1):
                if isinstance(library, Library):
                    bandwidths.append(_bandwidth(library, threads))
                for measure_name, measure in MEASURES.items():
                    told(f"{source.name} {form}: round {number} of {rounds}, {measure_name}")
                    for name, runner in runners.items():
                        reached = speed(runner, measure, least_s if number else 0.0)
                        if number:  # the first round warms up
                            taken[name].speeds[measure_name].append(reached)
                            if measure_name == "1" and bandwidths:
                                taken[name].shares.append(reached * runner.weight_bytes / bandwidths[-1])
                    if number and file is not None and isinstance(llama, LlamaCpp):
                        reached = tokens_per_s(llama, file, measure, threads=threads)
                        taken["llama_cpp"].speeds[measure_name].append(reached)
        for name, samples in taken.items():
            found[name][LIKE[form] if name == "llama_cpp" else form] = samples.medians()
            if samples.shares:
                found["bandwidth_share"].setdefault(name, {})[form] = round(statistics.median(samples.shares), 3)
        if "native" in taken:
            found["ratio"][form] = {
                f"native/{name}": {
                    measure_name: round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)
                    for measure_name, ours in taken["native"].speeds.items()
                    if (theirs := samples.speeds[measure_name])
                }
                for name, samples in taken.items()
                if name != "native"
            }
    told(f"{source.name}: accuracy")
    found["bandwidth_gb_s"] = round(max(bandwidths, default=0.0) / 1e9, 1)
    found |= accuracy(source, formats, threads, perplexity=source.name == SMOLLM2)
    return found


def _bandwidth(library: Library, threads: int) -> float:
    pool = library.pool(threads)
    try:
        return library.read_bandwidth(pool, BANDWIDTH_BYTES, 0.6)
    finally:
        pool.close()


def speed(runner: Runner, measure: Measure, least_s: float) -> float:
    """Tokens per second over at least `least_s` and two runs."""
    runner.run(measure)
    tokens = measure.tokens if isinstance(measure, Prefill) else measure.sequences
    started_s, runs = time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - started_s < least_s:
        runner.run(measure)
        runs += 1
    return runs * tokens / (time.perf_counter() - started_s)


# ---- models ---------------------------------------------------------------------------------------------------------


def shaped(model: str, scratch: Path) -> ModelSource:
    """A model by name; one of SHAPES is made the first time, with random weights in bfloat16."""
    if model not in SHAPES:
        return resolve(model)
    path = scratch / f"llama-{model}"
    if not (path / "config.json").is_file():
        torch.manual_seed(1)
        config = LlamaConfig(**SHAPES[model], max_position_embeddings=4096)
        with quiet_library():
            LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return resolve(str(path))


# ---- what is compared -----------------------------------------------------------------------------------------------


@contextmanager
def _runners(source: ModelSource, form: str, library: Library | str, threads: int) -> Iterator[dict[str, Runner]]:
    runners: dict[str, Runner] = {}
    if isinstance(library, Library):
        with suppress(NotNative):
            runners["native"] = NativeRunner(source, form, threads)
    if form in ("fp32", "bf16"):
        runners["torch"] = TorchRunner(source, form)
        runners["hf"] = LibraryRunner(source, form)
    try:
        yield runners
    finally:
        for runner in runners.values():
            runner.close()
        runners.clear()
        gc.collect()


def _dtype(form: str) -> str:
    return "float32" if form == "fp32" else "bfloat16"


def _parts(measure: Measure) -> Iterator[list[tuple[int, int, int]]]:
    """A measure's calls: sequence, position and rows of each part."""
    match measure:
        case Decode(sequences, context_tokens):
            yield [(number, context_tokens, 1) for number in range(sequences)]
        case Prefill(tokens):
            for start in range(0, tokens, PROMPT_ROWS):
                yield [(0, start, min(PROMPT_ROWS, tokens - start))]


_MOST_SEQUENCES = max(measure.sequences for measure in MEASURES.values() if isinstance(measure, Decode))
_MOST_TOKENS = max(measure.tokens for measure in MEASURES.values() if isinstance(measure, Prefill))


def _room(number: int) -> int:
    """Tokens of cache that a sequence needs; prompts go to the first."""
    return _MOST_TOKENS if number == 0 else CONTEXT + 1


class NativeRunner:
    """The native executor's stage of all blocks, and the head in the same format."""

    def __init__(self, source: ModelSource, form: str, threads: int) -> None:
        dtype, weights = _dtype(form), FORMATS[form]
        same = "same" if weights == dtype else weights
        blocks = BlockRange(0, source.block_count)
        self._stage = NativeStage(source.checkpoint, blocks, dtype=dtype, weights=same, threads=threads)
        self._head = Projection(source.checkpoint, dtype=dtype, weights=weights, threads=threads)
        self.stage_bytes = self._stage.weight_bytes
        """Of the blocks alone."""
        self.weight_bytes = self.stage_bytes + self._head.nbytes
        self._caches = [self._stage.open(_room(number)) for number in range(_MOST_SEQUENCES)]
        self._rows: dict[int, memoryview] = {}
        self._dtype = dtype
        self._hidden = source.hidden_size

    def run(self, measure: Measure) -> None:
        for parts in _parts(measure):
            rows = sum(count for *_, count in parts)
            if rows not in self._rows:
                self._rows[rows] = to_memory(_noise(rows, self._hidden, self._dtype))
            segments = [Segment(self._caches[number], position, count) for number, position, count in parts]
            output = self._stage.run(segments, self._rows[rows])
        self._head.logits(output if isinstance(measure, Decode) else output[-self._stage.row_bytes :])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of a prompt's activations."""
        cache = self._stage.open(len(hidden))
        try:
            data = to_memory(hidden.to(getattr(torch, self._dtype)))
            output = self._stage.run([Segment(cache, 0, len(hidden))], data)
        finally:
            cache.close()
        return torch.from_numpy(self._head.logits(output))

    def close(self) -> None:
        for cache in self._caches:
            cache.close()
        self._stage.close()
        self._head.close()


class TorchRunner:
    """The torch executor's stage of all blocks, and the client's head."""

    def __init__(self, source: ModelSource, form: str) -> None:
        self._dtype = _dtype(form)
        self._stage = Stage(source.path, BlockRange(0, source.block_count), dtype=self._dtype)
        self._ends = Ends(source.path, dtype=self._dtype)
        self._caches = [KVCache(_room(number)) for number in range(_MOST_SEQUENCES)]
        self._hidden = source.hidden_size
        self.weight_bytes = _read_bytes(source, self._dtype)

    def run(self, measure: Measure) -> None:
        for parts in _parts(measure):
            segments, start = [], 0
            for number, position, count in parts:
                segments.append(TorchSegment(self._caches[number], position, start, start + count))
                start += count
            output = self._stage.run(_noise(start, self._hidden, self._dtype), segments)
        self._ends.logits(output if isinstance(measure, Decode) else output[-1:])

    def close(self) -> None:
        del self._stage, self._ends, self._caches


class LibraryRunner:
    """The model library's own model, as it comes, with its own cache."""

    def __init__(self, source: ModelSource, form: str) -> None:
        with quiet_library():
            dtype = getattr(torch, _dtype(form))
            self._model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True).eval()
        self._caches: dict[int, DynamicCache] = {}
        self.weight_bytes = _read_bytes(source, _dtype(form))

    @torch.inference_mode()
    def run(self, measure: Measure) -> None:
        match measure:
            case Decode(sequences, context_tokens):
                cache = self._caches.get(sequences)
                if cache is None or cache.get_seq_length() > context_tokens + 64:
                    cache = self._caches[sequences] = DynamicCache()
                    prompt = torch.ones(sequences, context_tokens, dtype=torch.long)
                    self._model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
                self._model(torch.ones(sequences, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            case Prefill(tokens):
                self._model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)

    def close(self) -> None:
        del self._model, self._caches


def _noise(rows: int, hidden: int, dtype: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    return torch.randn(rows, hidden, generator=draw).to(getattr(torch, dtype))


def _read_bytes(source: ModelSource, dtype: str) -> int:
    """What one step reads of the weights in a dtype: all but the embedding, unless that is the head too."""
    numbers = 0
    for name, entry in source.checkpoint.tensors.items():
        if name != "model.embed_tokens.weight" or "lm_head.weight" not in source.checkpoint.tensors:
            numbers += math.prod(entry.shape)
    return numbers * (4 if dtype == "float32" else 2)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def accuracy(source: ModelSource, formats: Sequence[str], threads: int, *, perplexity: bool) -> dict[str, Any]:
    """Relative error of the logits against the torch executor in float32; on real weights the perplexities' ratio."""
    ends = Ends(source.path, dtype="float32")
    windows: list[Sequence[int]] = [range(100, 100 + CONTEXT)]
    if perplexity:
        windows = windows_of_text(Prompts(source.path).encode)
    wanted = _exact(source, ends, windows)
    errors: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for form in formats:
        try:
            runner = NativeRunner(source, form, threads)
        except NotNative:
            continue
        logits = [runner.logits(_embed(ends, window.tokens)) for window in wanted]
        runner.close()
        pairs = list(zip(logits, wanted, strict=True))
        errors[form] = _rounded(_root(float((a - b.logits).pow(2).mean()) / float(b.logits.var()) for a, b in pairs))
        if perplexity:
            loss = statistics.mean(window.loss(ours) for ours, window in pairs)
            ratios[form] = round(math.exp(loss - statistics.mean(window.loss(window.logits) for window in wanted)), 5)
    return {"logit_error": errors} | ({"ppl_ratio": ratios} if perplexity else {})


@dataclass(frozen=True, slots=True)
class _Window:
    tokens: Sequence[int]
    logits: torch.Tensor
    """(tokens, vocabulary), exact."""

    def loss(self, logits: torch.Tensor) -> float:
        """Mean cross entropy of each token but the first."""
        return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(self.tokens[1:])))


def _exact(source: ModelSource, ends: Ends, windows: Sequence[Sequence[int]]) -> list[_Window]:
    """What the torch executor computes in float32."""
    stage = Stage(source.path, BlockRange(0, source.block_count), dtype="float32")
    found = []
    for tokens in windows:
        hidden = stage.run(_embed(ends, tokens), [TorchSegment(KVCache(len(tokens)), 0, 0, len(tokens))])
        found.append(_Window(tokens, ends.logits(hidden)))
    return found


def _embed(ends: Ends, tokens: Sequence[int]) -> torch.Tensor:
    return ends.embed(torch.tensor(tokens), torch.arange(len(tokens)))


def windows_of_text(encode: Callable[[str], Sequence[int]]) -> list[Sequence[int]]:
    """English that every Python brings along: its documentation of the language. Raises BadOption."""
    text = "\n".join(str(pydoc_data.topics.topics[name]) for name in sorted(pydoc_data.topics.topics))
    tokens = encode(text[: 6 * WINDOW * WINDOWS])
    if len(tokens) < WINDOW * WINDOWS:
        raise BadOption("this Python's documentation is too short to take a perplexity over; use another Python")
    return [tokens[start : start + WINDOW] for start in range(0, WINDOW * WINDOWS, WINDOW)]


def _root(squares: Iterator[float]) -> float:
    return math.sqrt(statistics.mean(squares))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
