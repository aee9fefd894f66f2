"""A checkpoint's blocks described as the kernels take them, by its family's row of data.

Whatever a row does not say is refused: an unknown configuration key that is not as the library has it by itself, a
tensor too many, a kind of rotation whose frequencies are not fixed. The caller then takes the torch executor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bsns.core.blocks import BlockRange
from bsns.model.checkpoint import Checkpoint, TensorEntry
from bsns.native.families import ACTIVATIONS, FAMILIES, KNOWN, LAYER_NORM, Row


class NotNative(Exception):
    """These kernels do not compute this model; `reason` in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, start + count) of a tensor, or so many of a vector's numbers. Row i of them goes to row
    `first + 16 * step * (i // 16) + i % 16`."""

    tensor: TensorEntry
    start: int
    count: int
    first: int
    step: int = 1


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """A packed matrix, (rows, columns). Column c of a piece goes to `c // segment * padded_segment + c % segment`."""

    rows: int
    columns: int
    pieces: tuple[Piece, ...]
    segment: int
    padded_segment: int
    transposed: bool = False
    """Whether the tensors are kept (columns, rows)."""
    exact: bool = False
    """Whether it stays in float32 whatever the weights are kept in."""


@dataclass(frozen=True, slots=True)
class VectorPlan:
    """A norm or a bias in float32: zeros, and `plus` the pieces' numbers."""

    numbers: int
    pieces: tuple[Piece, ...]
    plus: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block. `up` and `down`: one each, or as many as there are experts. `vectors`: by names of library.VECTORS."""

    qkv: MatrixPlan
    out: MatrixPlan
    up: tuple[MatrixPlan, ...]
    down: tuple[MatrixPlan, ...]
    router: MatrixPlan | None
    vectors: Mapping[str, VectorPlan]
    rotary: int
    """Which of the architecture's rotations."""
    window: int
    """How many tokens a token sees, itself among them; 0: all."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """Inverse frequencies, of halves; `scale` of cosines and sines."""

    inverse_frequencies: tuple[float, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """A range of a model's blocks as the kernels take it; numbers as in library.Shape."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int
    norm: int
    activation: int
    gated: bool
    parallel: bool
    experts: int
    experts_per_token: int
    normalize_experts: bool
    epsilon: float
    attention_scale: float
    rotaries: tuple[Rotary, ...]
    blocks: tuple[BlockPlan, ...] = field(repr=False)


_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not depend on how long a session is."""
_DTYPES = ("F32", "BF16", "F16")
_WINDOWED, _FULL = "sliding_attention", "full_attention"
_ALIGNED = 64  # numbers: vectors are padded to it


def describe(
    checkpoint: Checkpoint, config: Any, blocks: BlockRange, padded_head: Callable[[int], int]
) -> Architecture:
    """The range of blocks as the kernels take it; `config` is model.configuration's, `padded_head` the library's.

    Raises NotNative.
    """
    row = FAMILIES.get(config.model_type)
    if row is None:
        raise NotNative(f"model type {config.model_type}")
    _check_keys(config, row)
    heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    rotaries, rotary_of = _rotations(config, row, head_size)
    activation = str(getattr(config, row.activation))
    if activation not in ACTIVATIONS:
        raise NotNative(f"activation {activation}")
    experts = int(getattr(config, row.experts)) if row.router else 0
    scale = float(getattr(config, row.attention_scale)) if row.attention_scale else float(head_size)
    tensors = _by_block(checkpoint, blocks)
    sizes = _Sizes(int(config.hidden_size), heads, kv_heads, head_size, padded_head(head_size), experts)
    return Architecture(
        hidden=sizes.hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        rotary_size=2 * len(rotaries[0].inverse_frequencies),
        norm=row.norm,
        activation=ACTIVATIONS[activation],
        gated=row.gated,
        parallel=_said(config, row.parallel),
        experts=experts,
        experts_per_token=int(config.num_experts_per_tok) if experts else 0,
        normalize_experts=_said(config, row.normalize_experts) if experts else False,
        epsilon=float(getattr(config, row.epsilon)),
        attention_scale=scale**-0.5,
        rotaries=rotaries,
        blocks=tuple(
            _Describer(row, config, sizes, tensors[index]).block(rotary_of.get(_layer_type(config, index), 0), index)
            for index in blocks
        ),
    )


def _check_keys(config: Any, row: Row) -> None:
    """Raises NotNative for a key that is not as its class has it by itself, unless the row or every row knows it."""
    read = {row.epsilon, row.activation, row.attention_scale, row.window, row.experts, row.normalize_experts}
    read |= {row.qkv_bias, row.out_bias, row.mlp_bias, row.parallel}
    known = KNOWN | row.handled | read
    plain = type(config)().to_dict()
    for key, value in sorted(config.to_dict().items()):
        if key.startswith("_") or key in known:
            continue
        # what its class does not know, nobody reads; but who wrote it meant something by it
        unchanged = value == plain[key] if key in plain else value is None or value is False
        if not unchanged:
            raise NotNative(f"{key} {value}")


def _said(config: Any, key: str | bool) -> bool:
    return key if isinstance(key, bool) else bool(getattr(config, key))


def _layer_type(config: Any, index: int) -> str:
    types = getattr(config, "layer_types", None)
    return str(types[index]) if types else ""


def _rotations(config: Any, row: Row, head_size: int) -> tuple[tuple[Rotary, ...], dict[str, int]]:
    """All kinds of rotation, and which each type of layer has."""
    if not row.rotary:
        return (Rotary(),), {}
    parameters = config.rope_parameters
    if all(isinstance(inner, dict) for inner in parameters.values()):  # one set for each type of layer
        types = sorted(parameters)
        found = tuple(_rotation(config, row, head_size, parameters[type_], type_) for type_ in types)
        return found, {type_: number for number, type_ in enumerate(types)}
    return (_rotation(config, row, head_size, parameters, None),), {}


def _rotation(config: Any, row: Row, head_size: int, parameters: Mapping[str, Any], layer_type: str | None) -> Rotary:
    """As the library's rotary modules reckon: in float32, with its own functions."""
    kind = parameters.get("rope_type", "default")
    if kind not in _FIXED_ROTATIONS:
        raise NotNative(f"rope type {kind}")
    # Here, because only this needs them; whoever has read a configuration has loaded both.
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "default":
        size = int(head_size * parameters.get("partial_rotary_factor", 1.0)) if row.partial_rotary else head_size
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        frequencies, scale = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    return Rotary(tuple(frequencies.float().tolist()), float(scale))


def _by_block(checkpoint: Checkpoint, blocks: BlockRange) -> dict[int, dict[str, TensorEntry]]:
    """The tensors of each block, by their names within it."""
    found: dict[int, dict[str, TensorEntry]] = {index: {} for index in blocks}
    for entry in checkpoint.tensors.values():
        index = entry.block
        if index is None or index not in found:
            continue
        name = re.split(rf"(?:^|\.)(?:layers|h|blocks|block)\.{index}\.", entry.name, maxsplit=1)[1]
        if name in found[index]:
            raise NotNative(f"two tensors {name} in a block")
        if entry.dtype not in _DTYPES:
            raise NotNative(f"weights in {entry.dtype}")
        found[index][name] = entry
    return found


@dataclass(frozen=True, slots=True)
class _Sizes:
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    padded_head: int
    experts: int

    @property
    def all_heads(self) -> int:
        return self.heads + 2 * self.kv_heads


class _Describer:
    """Takes a block's tensors one by one; what is left at the end is too many."""

    def __init__(self, row: Row, config: Any, sizes: _Sizes, tensors: dict[str, TensorEntry]) -> None:
        self._row = row
        self._config = config
        self._sizes = sizes
        self._left = dict(tensors)

    def block(self, rotary: int, index: int) -> BlockPlan:
        row, sizes = self._row, self._sizes
        heads = self._heads()
        qkv, out = self._qkv(heads), self._out()
        numbers = [str(number) for number in range(sizes.experts)] or [""]
        up = tuple(self._up(number) for number in numbers)
        down = tuple(self._matrix(row.down.format(number), sizes.hidden, 0) for number in numbers)
        inner = up[0].pieces[0].count
        if any(piece.count != inner for matrix in up for piece in matrix.pieces) or any(
            matrix.columns != inner for matrix in down
        ):
            raise NotNative("an MLP whose parts do not fit each other")
        router = row.router and replace(self._matrix(row.router, sizes.experts, sizes.hidden), exact=True)
        vectors = self._norms() | self._biases(heads, inner)
        plan = BlockPlan(qkv, out, up, down, router or None, vectors, rotary, self._window(index))
        left = [name for name in self._left if name not in row.ignored and not name.endswith("rotary_emb.inv_freq")]
        if left:
            raise NotNative(f"unknown tensor {min(left)}")
        return plan

    def _window(self, index: int) -> int:
        kind = _layer_type(self._config, index)
        if kind not in ("", _FULL, _WINDOWED):
            raise NotNative(f"layers of {kind}")
        if self._row.window is None or kind == _FULL:
            return 0
        return int(getattr(self._config, self._row.window, None) or 0)

    def _take(self, name: str, *shape: int) -> TensorEntry:
        """A tensor of this shape, of which 0 may be anything."""
        entry = self._left.pop(name, None)
        if entry is None:
            raise NotNative(f"no tensor {name}")
        if len(entry.shape) != len(shape) or any(
            want not in (0, got) for want, got in zip(shape, entry.shape, strict=True)
        ):
            raise NotNative(f"tensor {name} of shape {'×'.join(map(str, entry.shape))}")
        return entry

    def _weight(self, part: str, rows: int, columns: int) -> tuple[TensorEntry, int, int]:
        """A part's weight, and its rows and columns however it is kept."""
        name = f"{part}.weight"
        if self._row.transposed:
            entry = self._take(name, columns, rows)
            return entry, entry.shape[1], entry.shape[0]
        entry = self._take(name, rows, columns)
        return entry, entry.shape[0], entry.shape[1]

    def _heads(self) -> list[tuple[int, int]]:
        """For each head in the order of the packed rows: of which part it is, and its first row there."""
        row, sizes = self._row, self._sizes
        counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        if row.by_head:
            if sizes.heads != sizes.kv_heads:
                raise NotNative("grouped heads kept together")
            return [(0, (3 * head + kind) * sizes.head_size) for kind in range(3) for head in range(sizes.heads)]
        if len(row.query_key_value) == 1:
            return [(0, head * sizes.head_size) for head in range(sizes.all_heads)]
        return [(kind, head * sizes.head_size) for kind, count in enumerate(counts) for head in range(count)]

    def _part_rows(self) -> list[int]:
        """The rows of each part of query, key and value."""
        sizes = self._sizes
        if len(self._row.query_key_value) == 1:
            return [sizes.all_heads * sizes.head_size]
        return [count * sizes.head_size for count in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]

    def _head_pieces(self, entries: list[TensorEntry], heads: list[tuple[int, int]]) -> tuple[Piece, ...]:
        """Where each head goes; heads that follow one another on both sides are one piece."""
        size, padded = self._sizes.head_size, self._sizes.padded_head
        pieces: list[Piece] = []
        for number, (part, start) in enumerate(heads):
            last = pieces[-1] if pieces else None
            adjoining = last is not None and last.tensor is entries[part] and last.start + last.count == start
            if last is not None and adjoining and size == padded:
                pieces[-1] = Piece(last.tensor, last.start, last.count + size, last.first)
            else:
                pieces.append(Piece(entries[part], start, size, number * padded))
        return tuple(pieces)

    def _qkv(self, heads: list[tuple[int, int]]) -> MatrixPlan:
        sizes = self._sizes
        parts = zip(self._row.query_key_value, self._part_rows(), strict=True)
        entries = [self._weight(part, rows, sizes.hidden)[0] for part, rows in parts]
        rows = sizes.all_heads * sizes.padded_head
        return self._plan(rows, sizes.hidden, self._head_pieces(entries, heads))

    def _out(self) -> MatrixPlan:
        """Its columns are those of heads, which are padded."""
        sizes = self._sizes
        entry, rows, _ = self._weight(self._row.out, sizes.hidden, sizes.heads * sizes.head_size)
        wide = sizes.heads * sizes.padded_head
        return replace(
            self._plan(rows, wide, (Piece(entry, 0, rows, 0),)),
            segment=sizes.head_size,
            padded_segment=sizes.padded_head,
        )

    def _up(self, number: str) -> MatrixPlan:
        parts, hidden = [part.format(number) for part in self._row.up], self._sizes.hidden
        if not self._row.gated:
            return self._matrix(parts[0], 0, hidden)
        weights = [self._weight(part, 0, hidden) for part in parts]
        pieces = _gate_and_up([entry for entry, _, _ in weights], weights[0][1])
        return self._plan(2 * _padded(pieces[0].count, 16), hidden, pieces)

    def _matrix(self, part: str, rows: int, columns: int) -> MatrixPlan:
        """A part as it is."""
        entry, rows, columns = self._weight(part, rows, columns)
        return self._plan(rows, columns, (Piece(entry, 0, rows, 0),))

    def _plan(self, rows: int, columns: int, pieces: tuple[Piece, ...]) -> MatrixPlan:
        return MatrixPlan(rows, columns, pieces, columns, columns, self._row.transposed)

    def _norms(self) -> dict[str, VectorPlan]:
        row, sizes = self._row, self._sizes
        vectors: dict[str, VectorPlan] = {}
        for name in ("attention_norm", "mlp_norm", "after_attention_norm", "after_mlp_norm", "query_norm", "key_norm"):
            part = getattr(row, name)
            if part is None:
                continue
            size = sizes.head_size if name in ("query_norm", "key_norm") else sizes.hidden
            vectors[name] = self._vector(f"{part}.weight", size, row.norm_plus)
            if row.norm == LAYER_NORM:
                vectors[f"{name}_bias"] = self._vector(f"{part}.bias", size)
        return vectors

    def _vector(self, name: str, size: int, plus: float = 0.0) -> VectorPlan:
        return VectorPlan(_padded(size, _ALIGNED), (Piece(self._take(name, size), 0, size, 0),), plus)

    def _biases(self, heads: list[tuple[int, int]], inner: int) -> dict[str, VectorPlan]:
        row, sizes = self._row, self._sizes
        vectors: dict[str, VectorPlan] = {}
        if _said(self._config, row.qkv_bias):
            parts = zip(row.query_key_value, self._part_rows(), strict=True)
            entries = [self._take(f"{part}.bias", rows) for part, rows in parts]
            numbers = _padded(sizes.all_heads * sizes.padded_head, _ALIGNED)
            vectors["qkv_bias"] = VectorPlan(numbers, self._head_pieces(entries, heads))
        if _said(self._config, row.out_bias):
            vectors["out_bias"] = self._vector(f"{row.out}.bias", sizes.hidden)
        if not _said(self._config, row.mlp_bias):
            return vectors
        if sizes.experts:
            raise NotNative("experts with biases")
        vectors["down_bias"] = self._vector(f"{row.down}.bias", sizes.hidden)
        if not row.gated:
            vectors["up_bias"] = self._vector(f"{row.up[0]}.bias", inner)
            return vectors
        wide = inner if len(row.up) == 2 else 2 * inner
        pieces = _gate_and_up([self._take(f"{part}.bias", wide) for part in row.up], wide)
        vectors["up_bias"] = VectorPlan(_padded(2 * _padded(inner, 16), _ALIGNED), pieces)
        return vectors


def _gate_and_up(entries: list[TensorEntry], rows: int) -> tuple[Piece, ...]:
    """16 rows of gate and 16 of up by turns; `rows` are those of the first entry, which may hold both."""
    if len(entries) == 2:
        return tuple(Piece(entry, 0, rows, 16 * number, 2) for number, entry in enumerate(entries))
    half = rows // 2
    return tuple(Piece(entries[0], half * number, half, 16 * number, 2) for number in range(2))


def _padded(count: int, to: int) -> int:
    return -(-count // to) * to
