"""What a user may name as a model where only its shape is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bsns.cli.files import read_file, read_shape
from bsns.core.errors import BadOption, BsnsError, CorruptModel, ModelNotFound
from bsns.core.snapshot import ModelShape, Snapshot

DOCS = Path(__file__).parents[3] / "docs"
SHAPE = {"name": "toy", "block_bytes": 5, "block_count": 2, "hidden_bytes": 8}


@pytest.mark.parametrize("name", ["shape.json", "shape.JSON"])
def test_a_shape_file_ends_in_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(SHAPE))
    assert read_shape(str(tmp_path / name), "auto").block_bytes == (5, 5)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("nope.json", None, BadOption), ("shape.txt", json.dumps(SHAPE), CorruptModel), ("nope.txt", None, ModelNotFound)],
)
def test_what_is_no_model_is_told_of_shape_files(
    tmp_path: Path, name: str, content: str | None, kind: type[BsnsError]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=r"model's shape|something\.json"):
        read_shape(str(tmp_path / name), "auto")


def test_a_damaged_model_file_is_just_that(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no")
    with pytest.raises(CorruptModel) as caught:
        read_shape(str(tmp_path / "model.gguf"), "auto")
    assert "json" not in caught.value.message


def test_a_file_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"/dev/zero is larger than 1 MiB"):
        read_file(Path("/dev/zero"), 2**20)
    (tmp_path / "just").write_bytes(b"four")
    assert read_file(tmp_path / "just", 4) == b"four"
    with pytest.raises(BadOption, match="larger than 3 B"):
        read_file(tmp_path / "just", 3)


def test_the_examples_of_the_documentation_can_be_read() -> None:
    swarm, model = re.findall(r"```json\n(.*?)```", (DOCS / "files.md").read_text(), re.DOTALL)
    assert len(Snapshot.from_json(swarm.encode()).client) == 1
    assert ModelShape.from_json(model.encode()).block_count == 80
