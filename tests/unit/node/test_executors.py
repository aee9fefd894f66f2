"""Which executor a node takes, and what it says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from native_stages import needs_native
from tiny_models import FAMILIES, make_model

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.model.shapes import block_bytes
from bsns.model.source import ModelSource, resolve
from bsns.native.library import native_library
from bsns.node.capacity import Room
from bsns.node.executors import MAX_LABEL, Choice, choose_executor, load_executor

TinyModel = Callable[[str], Path]
BLOCKS = BlockRange(0, 2)


def choose(path: Path, *, device: str = "cpu", quant: str = "none", prefer: str = "auto") -> Choice:
    return choose_executor(resolve(str(path)), BLOCKS, device=device, quant=quant, prefer=prefer)


@needs_native
def test_native_where_it_can(tiny_model: TinyModel) -> None:
    for prefer in ("auto", "native"):
        assert choose(tiny_model("llama"), prefer=prefer, quant="int8") == Choice("native")
    assert choose(tiny_model("llama")).label == "native"


@needs_native
def test_torch_where_it_cannot(tiny_model: TinyModel) -> None:
    choice = choose(tiny_model("olmo2"))
    assert choice == Choice("torch", "model type olmo2")
    assert choice.label == "torch: model type olmo2"
    assert choose(tiny_model("llama"), device="cuda") == Choice("torch", "device cuda")


def test_torch_where_it_was_asked_for(tiny_model: TinyModel) -> None:
    assert choose(tiny_model("llama"), prefer="torch") == Choice("torch")


def test_torch_without_a_library(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNS_NATIVE", "0")
    assert choose(tiny_model("llama")).label == "torch: turned off by BSNS_NATIVE"
    with pytest.raises(BadOption, match=r"cannot run .*turned off by BSNS_NATIVE.*leave out --executor"):
        choose(tiny_model("llama"), prefer="native")
    assert choose(tiny_model("llama"), quant="int4").name == choose(tiny_model("llama"), quant="int8").name == "torch"


@needs_native
def test_what_cannot_be_had(tiny_model: TinyModel) -> None:
    with pytest.raises(BadOption, match="model type olmo2"):
        choose(tiny_model("olmo2"), prefer="native")
    assert choose(tiny_model("llama"), prefer="torch", quant="int4").name == "torch"
    for device, quant in (("cuda", "int4"), ("mps", "int8")):
        with pytest.raises(BadOption, match=f"weights in {quant} cannot be computed with on {device}"):
            choose(tiny_model("llama"), device=device, quant=quant)
    assert choose(tiny_model("llama"), device="cuda", quant="int8").name == "torch"


def test_options_that_nobody_knows(tiny_model: TinyModel) -> None:
    with pytest.raises(BadOption, match="auto, native or torch"):
        choose(tiny_model("llama"), prefer="abacus")
    with pytest.raises(BadOption, match="none, int8 or int4"):
        choose(tiny_model("llama"), quant="int2")


@needs_native
def test_a_reason_fits_a_record(tmp_path: Path) -> None:
    path = make_model(tmp_path, *FAMILIES["llama"])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"strange": "line\nbreak " * 30}))
    label = choose(path).label
    assert label.startswith("torch: strange line break")
    assert len(label) == MAX_LABEL
    assert label.isprintable()


@needs_native
@pytest.mark.parametrize(("family", "name"), [("llama", "native"), ("olmo2", "torch")])
def test_what_was_chosen_is_loaded(family: str, name: str, tiny_model: TinyModel) -> None:
    source = resolve(str(tiny_model(family)))
    choice = choose_executor(source, BLOCKS, device="cpu")
    executor = load_executor(choice, source, BLOCKS, dtype="bfloat16", device="cpu", threads=1)
    assert (executor.name, executor.blocks, executor.dtype) == (name, BLOCKS, "bfloat16")


def source_of(path: Path) -> ModelSource:
    return resolve(str(path))


def test_memory_follows_what_weights_are_kept_in(tmp_path: Path) -> None:
    options = FAMILIES["llama"][1] | {"hidden_size": 256, "intermediate_size": 512}
    source = source_of(make_model(tmp_path, "llama", options))
    full, eight, four = (sum(block_bytes(source, 2, weights)) for weights in ("none", "int8", "int4"))
    assert 0.5 * full < eight < 0.53 * full
    assert 0.26 * full < four < 0.29 * full


def test_memory_follows_what_keys_and_values_are_kept_in(tmp_path: Path) -> None:
    source = source_of(make_model(tmp_path, *FAMILIES["llama"]))
    config = source.checkpoint.config
    heads, size = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    assert source.kv_bytes_per_token_per_block(2) == 2 * heads * size * 2
    assert source.kv_bytes_per_token_per_block(2, "int8") == 2 * heads * (size + 4)


@needs_native
def test_planned_memory_is_what_the_arenas_take(tmp_path: Path) -> None:
    from bsns.model.configuration import read_config
    from bsns.native.architecture import describe
    from bsns.native.library import Library
    from bsns.native.weights import layout_of

    options = FAMILIES["llama"][1] | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    source = source_of(make_model(tmp_path, "llama", options))
    library = native_library()
    assert isinstance(library, Library)
    plan = describe(source.checkpoint, read_config(source.path), BLOCKS, library.padded_head).blocks[0]
    for weights, item_bytes in (("bfloat16", 2), ("float32", 4), ("int8", 2), ("int4", 2)):
        planned = block_bytes(source, item_bytes, "none" if weights in ("float32", "bfloat16") else weights)[0]
        assert layout_of(library, plan, weights).nbytes == pytest.approx(planned, rel=0.02)


def test_smaller_blocks_are_announced_as_more_memory() -> None:
    def room(own: int, planned: list[int] | None) -> Room:
        return Room(1000, [own] * 10, 1, 0, 1000, 20, 20, planned_block_bytes=planned)

    assert room(80, None).plannable_bytes(20) == 1000
    plannable = room(30, [80] * 10).plannable_bytes(20)
    assert plannable // (80 + 20) == 1000 // (30 + 20)
