"""The file that holds a schema library: one JSON object, bounded, and checked when it is read."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from bsns.core.errors import BadOption, BadSnapshot
from bsns.core.ids import ModelId
from bsns.core.plan import Objective
from bsns.core.snapshot import MAX_BLOCKS, MAX_TIME_S
from bsns.planning.likeness import FEATURES, QUANTILES, Likeness
from bsns.planning.problem import Floats
from bsns.planning.schemas import Library, Schema
from bsns.planning.transfer import Role
from bsns.topology.persistence import Diagrams
from bsns.topology.signature import Signature

LIBRARY_VERSION = 1
MAX_BYTES = 256 * 2**20
MAX_SCHEMAS = 10_000
MAX_POINTS = 5_000
"""Of one diagram."""
MAX_FIGURE = 1e12


class _Diagrams(msgspec.Struct, forbid_unknown_fields=True):
    h0: list[tuple[float, float | None]]
    h1: list[tuple[float, float | None]]


class _Role(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    start: int
    end: int
    time: float
    memory: float
    distance: float
    next_hop: float


class _Schema(msgspec.Struct, forbid_unknown_fields=True):
    node_count: int
    sampled: int
    scale_s: float
    plain: _Diagrams
    weighted: _Diagrams
    distances: list[float]
    features: list[float]
    roles: list[_Role]
    value_s: float


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    model: str
    model_name: str
    block_count: int
    bottleneck: float
    latency: float
    skipped: int
    schemas: list[_Schema]


def to_json(library: Library) -> bytes:
    """The library as `from_json` reads it; an infinite death is null."""
    return msgspec.json.encode(
        _File(
            LIBRARY_VERSION,
            library.model,
            library.model_name,
            library.block_count,
            library.objective.bottleneck,
            library.objective.latency,
            library.skipped,
            [_written(schema) for schema in library.schemas],
        )
    )


def from_json(text: bytes) -> Library:
    """The library in a file. Raises BadSnapshot with the place and the reason."""
    if len(text) > MAX_BYTES:
        raise BadSnapshot(f"a schema library of {len(text)} bytes is larger than any can be ({MAX_BYTES})")
    try:
        file = msgspec.json.decode(text, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadSnapshot(f"this is not a schema library: {error}") from None
    if file.version != LIBRARY_VERSION:
        raise BadSnapshot(f"this schema library has version {file.version}, this program knows {LIBRARY_VERSION}")
    if not 0 < file.block_count <= MAX_BLOCKS or len(file.schemas) > MAX_SCHEMAS or file.skipped < 0:
        raise BadSnapshot(f"a library of {len(file.schemas)} schemas for {file.block_count} blocks cannot be")
    try:
        objective = Objective(file.bottleneck, file.latency)
    except BadOption as error:
        raise BadSnapshot(f"the library's objective: {error}") from None
    schemas = tuple(_read(schema, number, file.block_count) for number, schema in enumerate(file.schemas))
    return Library(ModelId(file.model), file.model_name, file.block_count, objective, schemas, file.skipped)


def _written(schema: Schema) -> _Schema:
    seen = schema.like.signature
    return _Schema(
        schema.node_count,
        seen.node_count,
        seen.scale_s,
        _Diagrams(_points(seen.plain.h0), _points(seen.plain.h1)),
        _Diagrams(_points(seen.weighted.h0), _points(seen.weighted.h1)),
        schema.like.distances.tolist(),
        schema.like.features.tolist(),
        [_Role(role.start, role.end, role.time, role.memory, role.distance, role.next_hop) for role in schema.roles],
        schema.value_s,
    )


def _read(entry: _Schema, number: int, block_count: int) -> Schema:
    where = f"schema {number}"
    if not 1 <= entry.sampled <= entry.node_count <= MAX_FIGURE:
        raise BadSnapshot(f"{where}: {entry.sampled} of {entry.node_count} nodes cannot have been looked at")
    if not (0 < entry.scale_s <= MAX_TIME_S and 0 < entry.value_s <= MAX_FIGURE):
        raise BadSnapshot(f"{where}: a scale of {entry.scale_s} s or a value of {entry.value_s} s cannot be")
    sizes = {"distances": (entry.distances, len(QUANTILES) + 1), "features": (entry.features, FEATURES)}
    for name, (figures, size) in sizes.items():
        if len(figures) != size or not all(abs(figure) <= MAX_FIGURE for figure in figures):
            raise BadSnapshot(f"{where}: {name} are not {size} finite figures")
    signature = Signature(
        entry.sampled,
        entry.scale_s,
        Diagrams(_diagram(entry.plain.h0, where, 1), _diagram(entry.plain.h1, where, 0)),
        Diagrams(_diagram(entry.weighted.h0, where, 1), _diagram(entry.weighted.h1, where, 0)),
    )
    return Schema(
        Likeness(signature, np.array(entry.distances), np.array(entry.features)),
        entry.node_count,
        _roles(entry.roles, where, block_count),
        entry.value_s,
    )


def _roles(entries: list[_Role], where: str, block_count: int) -> tuple[Role, ...]:
    reached = 0
    for role in entries:
        ratios = (role.time, role.memory, role.distance)
        if role.start != reached or not role.start < role.end:
            raise BadSnapshot(f"{where}: blocks {role.start}:{role.end} do not follow block {reached}")
        if not all(0 < ratio <= MAX_FIGURE for ratio in ratios) or not 0 <= role.next_hop <= MAX_FIGURE:
            raise BadSnapshot(f"{where}: the role of blocks {role.start}:{role.end} has figures that cannot be")
        reached = role.end
    if reached != block_count:
        raise BadSnapshot(f"{where}: its roles cover {reached} of {block_count} blocks")
    return tuple(Role(role.start, role.end, role.time, role.memory, role.distance, role.next_hop) for role in entries)


def _points(points_K2: Floats) -> list[tuple[float, float | None]]:
    return [(born, died if math.isfinite(died) else None) for born, died in points_K2.tolist()]


def _diagram(points: list[tuple[float, float | None]], where: str, endless: int) -> Floats:
    if len(points) > MAX_POINTS:
        raise BadSnapshot(f"{where}: a diagram of {len(points)} points is larger than any can be ({MAX_POINTS})")
    read_K2 = np.array([(born, math.inf if died is None else died) for born, died in points]).reshape(-1, 2)
    births_K, deaths_K = read_K2.T
    if not ((births_K >= 0) & (births_K <= MAX_FIGURE) & (deaths_K > births_K)).all():
        raise BadSnapshot(f"{where}: a point of a diagram dies before it is born, or is no point")
    if int(np.isinf(deaths_K).sum()) != endless:
        raise BadSnapshot(f"{where}: a diagram has {int(np.isinf(deaths_K).sum())} points without end, not {endless}")
    return read_K2
