"""JSON schemas as constraints: whatever a random model draws under one fits it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
import torch
from scripted_engine import VOCABULARY

from bsns.client.prompts import Prompts
from bsns.client.sampling import SamplingOptions, sample
from bsns.gateway.grammar import Grammars, Matcher

NODE = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["ä", 1, None, {"a": [True]}]},
    "numbers": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 120}, "maxItems": 3},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 100},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "date": {"type": "string", "format": "date"},
    "text": {"type": "string", "maxLength": 12},
    "object": {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"const": 'quo"te\\'}, "c": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "oneOf": {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 9}]},
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
}


def drawn(constraint: Matcher, prompts: Prompts, seed: int, most: int = 300) -> str | None:
    """What a model without any preference says under it, but for the end, which it likes; None if it has no end."""
    logits_V, tokens = torch.zeros(VOCABULARY), list[int]()
    logits_V[prompts.tokenizer.eos_token_id] = 12.0
    for position in range(most):
        token = sample(constraint.mask(logits_V), tokens, SamplingOptions(temperature=1, seed=seed), position)
        constraint.accept(token)
        if token == prompts.tokenizer.eos_token_id:
            return str(prompts.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
        tokens.append(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_drawn_fits(name: str, prompts: Prompts, grammars: Grammars) -> None:
    texts = [drawn(grammars.schema(SCHEMAS[name]), prompts, seed) for seed in range(6)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 1
    for text in ended:
        value = json.loads(text)
        assert jsonschema_rs.is_valid(SCHEMAS[name], value), text


def test_the_calls_of_several_tools(prompts: Prompts, grammars: Grammars) -> None:
    tools = {"f": SCHEMAS["object"], 'g"': SCHEMAS["recursive"]}
    for seed in range(6):
        if (text := drawn(grammars.call(tools), prompts, seed)) is not None:
            call = json.loads(text)
            assert set(call) == {"name", "arguments"}
            assert jsonschema_rs.is_valid(tools[call["name"]], call["arguments"]), text


def test_logits_are_left_alone_and_may_be_longer_than_the_vocabulary(grammars: Grammars, prompts: Prompts) -> None:
    logits_V = torch.zeros(VOCABULARY)
    masked_V = grammars.schema({"type": "boolean"}).mask(logits_V)
    assert bool((logits_V == 0).all())
    allowed = {prompts.tokenizer.decode([i]) for i in (masked_V == 0).nonzero()[:, 0].tolist()}
    assert {"true", "false", "t"} <= allowed
    assert all("true".startswith(word) or "false".startswith(word) for word in allowed)


def test_bytes_of_tokens(grammars: Grammars, prompts: Prompts) -> None:
    text = "né 🙂"
    tokens = prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(grammars.bytes_of(token) for token in tokens) == text.encode()
