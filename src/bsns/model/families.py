"""Where a model family keeps its parts, for the few that differ from the usual names.

A row is all a new decoder family needs, and most need none: the library's own modules run unchanged. What a row cannot
say (scaled embeddings, extra inputs to attention) is caught by the checks in `stage` and `ends` when a model loads.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Attribute names inside the library's base model."""

    layers: str = "layers"
    final_norm: str = "norm"
    learned_positions: str | None = None
    """A table of position embeddings added to the token embeddings; it belongs to the client's end."""


FAMILIES: dict[str, Family] = {
    "gpt2": Family(layers="h", final_norm="ln_f", learned_positions="wpe"),
    "gpt_neox": Family(final_norm="final_layer_norm"),
}


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, Family())
