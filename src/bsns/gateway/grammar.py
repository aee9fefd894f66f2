"""JSON schemas as constraints on tokens, by llguidance (docs/decisions/0013-constrained-decoding.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray

from bsns.core.errors import BadOption

MOST_SCHEMA_BYTES = 256 << 10
"""Of a request's schemas together: what takes the library about half a second."""
MOST_LETTERS = 300
"""Of what the library says of a schema."""
# One way to write a value, as json.dumps does: every token is a walk through the swarm, and none is spent on blanks, of
# which a small model in doubt writes many.
_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes constraints for one model. May be called from several threads; `compiling` has two, so that those whose
    schemas take long wait for each other, and not everybody's text for them."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """`tokenizer` is a fast one of transformers; takes about a second."""
        size = max(vocab_size, len(tokenizer))
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size)
        self._eos = int(tokenizer.eos_token_id)
        self.compiling = ThreadPoolExecutor(2, thread_name_prefix="grammar")

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; it need not be whole characters."""
        return bytes(self._tokenizer.decode_bytes([token]))

    def schema(self, schema: Mapping[str, Any]) -> Matcher:
        """JSON values that fit a schema. Raises BadOption for one that is wrong, unsatisfiable or not supported."""
        return self._matcher(LLMatcher.grammar_from_json_schema(_tight(schema)))

    def call(self, tools: Mapping[str, Mapping[str, Any]]) -> Matcher:
        """A call of one of these: {"name": …, "arguments": …} with arguments that fit the tool's schema."""
        # Each schema is a grammar of its own, so that its references go on pointing into it.
        rules = []
        for i, (name, schema) in enumerate(tools.items()):
            opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            rules.append(f'call_{i}: {opening} arguments_{i} "}}"')
            rules.append(f"arguments_{i}: %json {_tight(schema)}")
        start = "start: " + " | ".join(f"call_{i}" for i in range(len(tools)))
        return self._matcher(LLMatcher.grammar_from_lark("\n".join([start, *rules])))

    def _matcher(self, grammar: str) -> Matcher:
        if len(grammar) > MOST_SCHEMA_BYTES:
            raise BadOption(f"the JSON schemas have {len(grammar)} bytes; give up to {MOST_SCHEMA_BYTES}")
        matcher = Matcher(LLMatcher(self._tokenizer, grammar, log_level=0), self._eos)
        matcher.allowed()  # some of what nothing can satisfy shows only here
        return matcher


class Matcher:
    """A client's Constraint: one answer's place in a grammar.

    Every method raises BadOption where the schema is wrong or grows beyond the library's limits.
    """

    def __init__(self, matcher: LLMatcher, eos: int) -> None:
        self._matcher = matcher
        self._eos = eos
        self._check()

    def copy(self) -> Matcher:
        """Another answer's, from here on: a grammar is compiled once."""
        return Matcher(self._matcher.deep_copy(), self._eos)

    def allowed(self) -> NDArray[np.uint8]:
        """A bit for each token, the lowest of a byte first."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return bits

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        allowed_V = np.unpackbits(self.allowed(), count=len(logits_V), bitorder="little").view(np.bool_)
        return torch.where(torch.from_numpy(allowed_V), logits_V, -torch.inf)  # a third of masked_fill's time

    def accept(self, token: int) -> None:
        if token != self._eos and not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = " ".join(self._matcher.get_error().partition("<state>")[0].split())
            raise BadOption(f"the JSON schema cannot be used: {why[:MOST_LETTERS]}")


def _tight(schema: Mapping[str, Any]) -> str:
    return json.dumps(dict(schema) | {"x-guidance": _OPTIONS})
