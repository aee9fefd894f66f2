"""Files that a user names: what is read from them and written to them, mistakes told in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bsns.cli.console import Dtype
from bsns.core.errors import BadOption
from bsns.core.snapshot import ModelShape


def read_file(file: Path) -> bytes:
    """What is in a file. Raises BadOption."""
    try:
        return file.expanduser().read_bytes()
    except OSError as error:
        raise BadOption(f"{file} cannot be read: {error.strerror}") from None


def write_file(file: Path, content: bytes) -> None:
    """Put `content` into a file. Raises BadOption."""
    try:
        file.expanduser().write_bytes(content)
    except OSError as error:
        raise BadOption(f"{file} cannot be written: {error.strerror}") from None


def is_shape_file(model: str) -> bool:
    """Whether what a user named as a model is a file with the shape of one."""
    file = Path(model).expanduser()
    return file.suffix == ".json" and file.is_file()


def read_shape(model: str, dtype: Dtype, in_use: Sequence[str] = ()) -> ModelShape:
    """The shape of a model or in a shape file; `auto`: at the commonest precision of those in use, else bfloat16.

    Raises BadOption, BadSnapshot, or what is wrong with the model.
    """
    if is_shape_file(model):
        return ModelShape.from_json(read_file(Path(model)))
    from bsns.model.shapes import shape_of
    from bsns.model.source import resolve

    common = max(set(in_use), key=in_use.count) if in_use else "bfloat16"
    return shape_of(resolve(model), common if dtype == "auto" else dtype)
