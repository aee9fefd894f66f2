"""Files that a user names: what is read from them and written to them, mistakes told in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bsns.cli.console import Dtype
from bsns.core.errors import BadOption, CorruptModel, ModelNotFound
from bsns.core.snapshot import ModelShape
from bsns.core.words import size

MOST_BYTES = 256 * 2**20
"""As many as a library of schemas may have, the largest of what is read. A device such as /dev/zero has no end."""


def read_file(file: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """What is in a file. Raises BadOption."""
    try:
        with file.expanduser().open("rb") as opened:
            content = opened.read(most_bytes + 1)
    except OSError as error:
        raise BadOption(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > most_bytes:
        raise BadOption(f"{file} is larger than {size(most_bytes)}, more than any file that is read here")
    return content


def write_file(file: Path, content: bytes) -> None:
    """Put `content` into a file. Raises BadOption."""
    try:
        file.expanduser().write_bytes(content)
    except OSError as error:
        raise BadOption(f"{file} cannot be written: {error.strerror}") from None


def is_shape_file(model: str) -> bool:
    """Whether what a user named as a model is a file with the shape of one."""
    file = Path(model).expanduser()
    return file.suffix.lower() == ".json" and not file.is_dir()


def read_shape(model: str, dtype: Dtype, in_use: Sequence[str] = ()) -> ModelShape:
    """The shape of a model or in a shape file; `auto`: at the commonest precision of those in use, else bfloat16.

    Raises BadOption, BadSnapshot, or what is wrong with the model.
    """
    if is_shape_file(model):
        try:
            return ModelShape.from_json(read_file(Path(model)))
        except BadOption as error:
            raise BadOption(f"{error.message}; a MODEL called something.json is a file with a model's shape") from None
    from bsns.model.shapes import shape_of
    from bsns.model.source import resolve

    try:
        source = resolve(model)
    except (ModelNotFound, CorruptModel) as error:
        file = Path(model).expanduser()
        if file.is_dir() or file.suffix.lower() == ".gguf":
            raise
        raise type(error)(f"{error.message}; a file with a model's shape has to be called something.json") from None
    common = max(set(in_use), key=in_use.count) if in_use else "bfloat16"
    return shape_of(source, common if dtype == "auto" else dtype)
