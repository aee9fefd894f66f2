"""Tool calls: what the model is asked for, and what is read from its text.

Models write calls as JSON objects with `name` and `arguments` (or `parameters`), one or a list of them, in one of two
formats: between <tool_call> and </tool_call> (Hermes, Qwen, SmolLM2), or bare, as the answer's first character or after
a special token that is no text (Llama 3, Mistral). A model's chat template tells which.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a model's calls stand in its text."""

    opening: str
    """"" for bare calls."""

    @property
    def prefix(self) -> str:
        """How an answer begins that has to be a call."""
        return f"{self.opening}\n" if self.opening else ""


def format_of(template: str) -> CallFormat | None:
    """The format of a chat template's calls; None if it has no tools, or a format that is not known here."""
    if not re.search(r"\btools\b", template) or "<function=" in template:
        return None
    if OPENING in template:
        return CallFormat(OPENING)
    if "[TOOL_CALLS]" in template or '"parameters"' in template or "<|python_tag|>" in template:
        return CallFormat("")
    return None


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """JSON."""


def read_calls(text: str, names: frozenset[str]) -> list[ToolCall]:
    """The calls in a text of JSON values and closing marks; none unless all of it is calls of tools that there are."""
    calls: list[ToolCall] = []
    decoder, at = json.JSONDecoder(), 0
    text = text.replace(OPENING, " ").replace(CLOSING, " ")
    while (at := _skip(text, at)) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _call(item)
            if call is None or call.name not in names:
                return []
            calls.append(call)
    return calls


class CallReader:
    """Parts one streamed answer into what is said and what is called."""

    def __init__(self, format_: CallFormat, names: frozenset[str]) -> None:
        self._format, self._names = format_, names
        self._held = ""
        self._calling = False
        self._said = False

    def push(self, text: str) -> str:
        """The text to pass on by now; what is, or may become, a call is held back."""
        text, self._held = self._held + text, ""
        if self._calling:
            self._held = text
            return ""
        opening = self._format.opening
        if not opening:
            if not self._said and text.lstrip()[:1] in ("", "{", "["):
                self._calling, self._held = bool(text.strip()), text
                return ""
            self._said = True
            return text
        at = text.find(opening)
        if at >= 0:
            self._calling, self._held = True, text[at:]
            return text[:at]
        held = next((n for n in range(min(len(text), len(opening) - 1), 0, -1) if text.endswith(opening[:n])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> tuple[str, list[ToolCall]]:
        """At the answer's end: what was held back, as text or as calls."""
        held, self._held = self._held, ""
        calls = read_calls(held, self._names) if self._calling else []
        return ("", calls) if calls else (held, [])


def _call(item: Any) -> ToolCall | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the object as a string
        return ToolCall(item["name"], arguments)
    return ToolCall(item["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _skip(text: str, at: int) -> int:
    """Past blanks, and past what may stand between two calls."""
    while at < len(text) and (text[at].isspace() or text[at] in ";,"):
        at += 1
    return at
