"""A conversation as the model's own prompt, and what its answer is bound to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bsns.client.prompts import Prompts
from bsns.gateway.errors import bad_request
from bsns.gateway.grammar import Grammars, Matcher
from bsns.gateway.requests import ChatRequest, Message, NamedTool, SchemaFormat, Tool
from bsns.gateway.tools import CallFormat, format_of


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The prompt's tokens, and how the answer is to be read."""

    tokens: list[int]
    calls: CallFormat | None
    """How calls are written, where there may be some."""
    names: frozenset[str]
    called: bool
    """The answer can only be a call; `calls.prefix` stands in the prompt already."""


def prompt_of(request: ChatRequest, prompts: Prompts) -> ChatPrompt:
    """Raises ApiError, BadOption."""
    offered = offered_tools(request)
    format_ = format_of(prompts.chat_template()) if offered else None
    if offered and format_ is None:
        raise bad_request(
            "this model's chat template has no tools, or writes calls in a way that this gateway does not read; "
            "ask without tools, or serve a model whose template has them",
            "tools",
            "tools_not_supported",
        )
    called = bool(offered) and request.tool_choice not in (None, "auto")
    tokens = prompts.encode_chat(
        [_message(i, message) for i, message in enumerate(request.messages)],
        tools=[tool.model_dump(exclude_none=True) for tool in offered] or None,
        opening=format_.prefix if called and format_ else "",
    )
    return ChatPrompt(tokens, format_, frozenset(tool.function.name for tool in offered), called)


def offered_tools(request: ChatRequest) -> list[Tool]:
    """The tools that the answer may call. Raises ApiError."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("two tools have the same name", "tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise bad_request(f"tool_choice names {choice.function.name}, which tools does not have", "tool_choice")
        return [tool for tool in tools if tool.function.name == choice.function.name]
    if choice in ("auto", "required") and not tools:
        raise bad_request("tool_choice is for requests with tools", "tool_choice")
    return [] if choice == "none" else tools


def constraint_of(request: ChatRequest, grammars: Grammars) -> Matcher | None:
    """What the answer has to be, for one choice. Raises BadOption for a schema that cannot be used."""
    tools = offered_tools(request)
    if tools and request.tool_choice not in (None, "auto"):
        return grammars.call({tool.function.name: tool.function.parameters or {"type": "object"} for tool in tools})
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if tools:
        raise bad_request(
            "response_format binds all of the answer to JSON, so that it cannot call; set tool_choice to none",
            "response_format",
        )
    schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else None
    return grammars.schema({"type": "object"} if schema is None else schema)


def _message(at: int, message: Message) -> dict[str, Any]:
    """As chat templates know messages: text is one string, and a call's arguments are an object."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or [])
    # Templates know no developer; to them it is who the system's instructions come from.
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.tool_calls:
        told["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": arguments}}
            for call in message.tool_calls
            for arguments in [_arguments(at, call.function.arguments)]
        ]
    elif content is None:
        raise bad_request("a message needs content", f"messages.{at}.content")
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            told[name] = value
    return told


def _arguments(at: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request("a tool call's arguments are a JSON object, as a string", f"messages.{at}.tool_calls")
    return value
