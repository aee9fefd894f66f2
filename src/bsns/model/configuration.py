"""A model's configuration as the model library reads config.json: its defaults filled in, old names made new."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from bsns.core.errors import CorruptModel, UnsupportedModel
from bsns.model.failures import first_line


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration of a safetensors directory. Raises CorruptModel, UnsupportedModel."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CorruptModel(f"{path}/config.json cannot be read: {first_line(error)}") from error
    if not getattr(config, "num_hidden_layers", None) or not getattr(config, "hidden_size", None):
        raise UnsupportedModel(f"model type {config.model_type!r} is not a row of decoder blocks")
    return config
