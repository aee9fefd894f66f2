"""Likeness: by which figures of two swarms one tells how alike they are, for looking up plans.

ph         persistent homology (topology.signature)
distances  the distances between nodes, sorted
features   raw figures: how many nodes, their speeds and memories, the spread of distances
none       nothing: any swarm is as good as another; what the others have to beat
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from bsns.core.errors import BadOption
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.planning.problem import Floats
from bsns.topology.distance import distances
from bsns.topology.signature import Signature, signature_distance, signature_of

Key = Literal["ph", "distances", "features", "none"]
KEYS: tuple[Key, ...] = get_args(Key)

QUANTILES = np.linspace(0.0, 1.0, 33)
SHORTLIST = 4
"""For each swarm wanted so many are compared by their diagrams, after their signatures' vectors have chosen them."""
FEATURES = 12
LEAST_S = 1e-7


@dataclass(frozen=True, slots=True)
class Likeness:
    """What each key compares. `distances`: base-2 logarithms of seconds at 33 quantiles, and of the size."""

    signature: Signature
    distances: Floats
    features: Floats


def likeness(snapshot: Snapshot, shape: ModelShape) -> Likeness:
    """The figures of a swarm that is to run this model. Raises BadSnapshot."""
    seen = distances(snapshot, size_bytes=shape.hidden_bytes)
    apart_s = seen.matrix_MM[np.triu_indices(len(seen.index_M), 1)]
    log_apart = np.log2(np.maximum(apart_s, LEAST_S)) if len(apart_s) else np.full(1, np.log2(LEAST_S))
    log_time_N = np.log2([node.block_time_s for node in snapshot.nodes])
    memory_N = np.array([node.memory_bytes for node in snapshot.nodes], dtype=np.float64)
    share_N = np.log2(np.maximum(memory_N / max(sum(shape.block_bytes), 1), 1e-6))
    size = np.log2(len(snapshot.nodes))
    spread = [log_apart.mean(), log_apart.std(), np.median(log_apart), log_apart.min(), log_apart.max()]
    nodes = [log_time_N.mean(), log_time_N.std(), log_time_N.min(), share_N.mean(), share_N.std(), share_N.max()]
    return Likeness(
        signature_of(seen, snapshot),
        np.append(np.quantile(log_apart, QUANTILES), size),
        np.array([size, *spread, *nodes], dtype=np.float64),
    )


def nearest(key: Key, wanted: Likeness, known: Sequence[Likeness], count: int, rng: np.random.Generator) -> list[int]:
    """The numbers of the `count` swarms most like the one wanted, the most alike first. Raises BadOption."""
    if not known or count < 1:
        return []
    if key == "none":
        return [int(number) for number in rng.permutation(len(known))[:count]]
    if key == "ph":
        vectors = _apart([like.signature.vector for like in known], wanted.signature.vector)
        short = np.argsort(vectors, kind="stable")[: SHORTLIST * count]
        apart = [signature_distance(wanted.signature, known[number].signature) for number in short]
        return [int(short[place]) for place in np.argsort(apart, kind="stable")[:count]]
    if key == "distances":
        # All but the size: the mean difference of two quantile functions, their Wasserstein distance.
        table = np.array([like.distances for like in known]) - wanted.distances
        apart_K = np.abs(table[:, :-1]).mean(axis=1) + np.abs(table[:, -1])
    elif key == "features":
        apart_K = _apart([like.features for like in known], wanted.features)
    else:
        raise BadOption(f"there is no key {key!r}; use {', '.join(KEYS)}")
    return [int(number) for number in np.argsort(apart_K, kind="stable")[:count]]


def _apart(rows: Sequence[Floats], wanted: Floats) -> Floats:
    """How far each row is from the one wanted; each figure in units of its own spread."""
    table = np.array(rows)
    spread = table.std(axis=0)
    return np.asarray(np.linalg.norm((table - wanted) / np.where(spread > 1e-12, spread, 1.0), axis=1))
