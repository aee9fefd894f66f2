"""A model's ends for a client: the head on the native kernels where they can, else on the model library's layers."""

from __future__ import annotations

from contextlib import suppress

from bsns.model.ends import Ends
from bsns.model.source import ModelSource
from bsns.native.architecture import NotNative
from bsns.native.projection import Projection


def load_ends(source: ModelSource, *, dtype: str, device: str = "cpu", threads: int = 1) -> Ends:
    """Raises as `Ends`, and NotEnoughMemory."""
    project = None
    if device == "cpu":
        with suppress(NotNative):
            project = Projection(source.checkpoint, dtype=dtype, weights=dtype, threads=threads).logits
    return Ends(source.path, dtype=dtype, device=device, project=project)
