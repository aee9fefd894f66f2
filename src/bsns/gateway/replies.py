"""What clients get: OpenAI's objects, made of plain data."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from bsns.client.pieces import Piece
from bsns.client.sampling import Logprobs
from bsns.gateway.answering import Usage
from bsns.gateway.tools import CallReader, ToolCall

BytesOf = Callable[[int], bytes]


@dataclass(slots=True)
class Choice:
    """One choice of a reply, as far as it has come."""

    index: int
    bytes_of: BytesOf
    end_tokens: frozenset[int]
    calls: CallReader | None = None
    text: str = ""
    told: list[tuple[int, Logprobs]] = field(default_factory=list)
    """Tokens with their log-probabilities, where the client asked for them."""
    made: list[ToolCall] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0
    """Letters of the tokens told by `text_logprobs` so far."""

    def push(self, piece: Piece) -> tuple[str, list[ToolCall], list[tuple[int, Logprobs]]]:
        """What this piece adds: text, calls, and tokens with their log-probabilities."""
        text, calls = piece.text, list[ToolCall]()
        if self.calls is not None:
            text = self.calls.push(text)
            if piece.finished:
                rest, calls = self.calls.finish()
                text += rest
        told = []
        if piece.logprobs is not None and piece.token is not None and piece.token not in self.end_tokens:
            told = [(piece.token, piece.logprobs)]
        self.text += text
        self.told += told
        self.made += calls
        if piece.finished:
            self.finish = "tool_calls" if calls else piece.finished
        return text, calls, told

    def chat_logprobs(self, told: list[tuple[int, Logprobs]]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = self.bytes_of(token)
            # A logprob of -inf is no JSON; OpenAI says -9999 for what cannot be.
            return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

        return {
            "content": [
                entry(token, each.chosen) | {"top_logprobs": [entry(*other) for other in each.top]}
                for token, each in told
            ],
            "refusal": None,
        }

    def text_logprobs(self, told: list[tuple[int, Logprobs]]) -> dict[str, Any]:
        """Of the next tokens: `text_offset` says where in the choice's text each begins."""
        words = [self.bytes_of(token).decode(errors="replace") for token, _ in told]
        *offsets, self.offset = accumulate(map(len, words), initial=self.offset)
        tops = [
            {self.bytes_of(token).decode(errors="replace"): max(logprob, -9999.0) for token, logprob in each.top}
            for _, each in told
        ]
        chosen = [max(each.chosen, -9999.0) for _, each in told]
        return {"tokens": words, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


@dataclass(frozen=True, slots=True)
class Reply:
    """One request's reply: its id, and whether it is chat."""

    model: str
    chat: bool
    logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        """For a client that does not stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [self._choice(choice) for choice in choices], "usage": usage_of(usage)}

    def chunk(
        self, choice: Choice, text: str, calls: list[ToolCall], told: list[tuple[int, Logprobs]]
    ) -> dict[str, Any]:
        """What a piece adds, for a client that streams."""
        logprobs = None
        if self.chat:
            delta: dict[str, Any] = {}
            if text or not (calls or choice.finish):
                delta["content"] = text
            if calls:
                first = len(choice.made) - len(calls)
                delta["tool_calls"] = [{"index": first + i} | _call(call) for i, call in enumerate(calls)]
            if told:
                logprobs = choice.chat_logprobs(told)
            part: dict[str, Any] = {"delta": delta}
        else:
            if told:
                logprobs = choice.text_logprobs(told)
            part = {"text": text}
        return self._chunk(part | {"index": choice.index, "finish_reason": choice.finish, "logprobs": logprobs})

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice, which says who speaks."""
        part = {"delta": {"role": "assistant", "content": ""}, "index": index, "finish_reason": None, "logprobs": None}
        return self._chunk(part)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, for a client that asked for the usage."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": usage_of(usage)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        id_ = ("chatcmpl-" if self.chat else "cmpl-") + self.id
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(self._chunk_kind) | {"choices": [choice]}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        head = {"index": choice.index, "finish_reason": choice.finish}
        if not self.chat:
            logprobs = choice.text_logprobs(choice.told) if self.logprobs else None
            return head | {"text": choice.text, "logprobs": logprobs}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.made:
            message |= {"content": choice.text or None, "tool_calls": [_call(call) for call in choice.made]}
        return head | {"message": message, "logprobs": choice.chat_logprobs(choice.told) if self.logprobs else None}


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.answer_tokens,
        "total_tokens": usage.prompt_tokens + usage.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
