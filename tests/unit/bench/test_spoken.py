"""Models of random weights with a made-up tokenizer, and what language-pipes is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

from bsns.bench.language_pipes import configuration, link_model
from bsns.bench.spoken import spoken, text_of
from bsns.client.prompts import Prompts
from bsns.core.blocks import BlockRange
from bsns.model.source import ModelSource, resolve

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_model(tmp_path_factory.mktemp("models") / "mute", "llama", SIZES)))


def test_a_mute_model_is_given_a_tokenizer_and_stays_the_same_model(mute: ModelSource) -> None:
    speaking = spoken(mute)
    assert (speaking.model_id, speaking.block_count) == (mute.model_id, mute.block_count)
    assert not (mute.path / "tokenizer.json").exists()
    prompts = Prompts(speaking.path)
    tokens = prompts.encode_chat([{"role": "user", "content": "ab"}])
    assert len(tokens) == 3
    assert prompts.tokenizer.decode(tokens) == "ab\n"
    assert prompts.tokenizer.decode([SIZES["vocab_size"] - 1]) != ""
    assert spoken(mute).path == speaking.path
    assert spoken(speaking) == speaking


def test_texts_have_as_many_tokens_as_asked_for_and_differ(mute: ModelSource) -> None:
    prompts = Prompts(spoken(mute).path)
    one, other = (text_of(prompts, 90, number) for number in (1, 2))
    assert one != other
    assert 90 <= len(prompts.encode(one)) < 105
    assert 900 <= len(prompts.encode(text_of(prompts, 900))) < 915


def test_language_pipes_gets_links_and_memory_for_its_share(mute: ModelSource, tmp_path: Path) -> None:
    link_model(mute.path, tmp_path / "data")
    link_model(mute.path, tmp_path / "data")
    assert (tmp_path / "data" / "config.json").read_text() == (mute.path / "config.json").read_text()
    first, second = (configuration(n, mute, BlockRange(n, n + 1), (1, 2, 3), "key") for n in (0, 1))
    of_block = 2 * (2 * 64 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)  # norms, attention, feed-forward; 16 bits
    assert first["layer_models"][0]["memory"] * 2**30 == pytest.approx(1.5 * of_block)
    assert first["api_keys"] == ["key"]
    assert first["job_port"] == 3
    assert second["bootstrap_nodes"] == [{"address": "127.0.0.1", "port": 1}]
    assert "job_port" not in second
    assert "end_models" not in second
