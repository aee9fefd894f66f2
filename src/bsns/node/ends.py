"""A model's ends for a client: the head on the native kernels where they can, else on the model library's layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from bsns.model.ends import Ends
from bsns.model.source import ModelSource
from bsns.native.architecture import NotNative
from bsns.native.projection import Projection
from bsns.protocol.records import NodeRecord


def load_ends(
    source: ModelSource, *, dtype: str, device: str = "cpu", threads: int = 1, weights: str | None = None
) -> Ends:
    """The head's weights are kept in `weights`, in the dtype unless it is given, where the native kernels compute it.
    Raises as `Ends`, and NotEnoughMemory."""
    project = None
    if device == "cpu":
        with suppress(NotNative):
            project = Projection(source.checkpoint, dtype=dtype, weights=weights or dtype, threads=threads).logits
    return Ends(source.path, dtype=dtype, device=device, project=project, weights=weights)


def head_weights(records: Sequence[NodeRecord], dtype: str) -> str:
    """In what a client keeps the head for nodes that compute in a dtype: in 8 bits where all of them keep their blocks
    in as many or fewer. It is read for every token, and of a small model a good part of what is."""
    return "int8" if all(record.quant != "none" for record in records if record.dtype == dtype) else dtype
