"""Tool calls: what is read from a model's text, however it is split, and what a client gets of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from scripted_engine import HERMES, ScriptedEngine, chat, tool

from bsns.gateway.tools import CallFormat, CallReader, ToolCall, format_of, read_calls

NAMES = frozenset({"f", "g"})
F, G = ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")
TAGGED, BARE = CallFormat("<tool_call>"), CallFormat("")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES, TAGGED),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", BARE),
        ('{% if tools %}{"name": x, "parameters": y}{% endif %}', BARE),
        ("{% if tools %}<tool_call><function=f>{% endif %}", None),
        ("{% if tools %}call however you like{% endif %}", None),
        ("{{ messages }} <tool_call>", None),
        ("", None),
    ],
)
def test_formats(template: str, expected: CallFormat | None) -> None:
    assert format_of(template) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [F]),
        ('{"name": "f", "parameters": {"a": 1}}', [F]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [F]),
        ('[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', [F, G]),
        ('{"name": "f", "arguments": {"a": 1}}; {"name": "g"}', [F, G]),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            [F, G],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', [F]),  # the end was an end token
        ('{"name": "unknown", "arguments": {}}', []),
        ('{"name": "f", "arguments": [1]}', []),
        ('{"name": ["f"]}', []),
        ('{"name": "f"', []),
        ('{"name": "f"} and so on', []),
        ("[" * 100_000, []),
        ("[]", []),
        ("", []),
    ],
)
def test_calls_in_a_text(text: str, expected: list[ToolCall]) -> None:
    assert read_calls(text, NAMES) == expected


@pytest.mark.parametrize(
    ("format_", "text", "said", "calls"),
    [
        (TAGGED, 'Let me see. <tool_call>\n{"name": "g"}\n</tool_call>', "Let me see. ", [G]),
        (TAGGED, "2 < 3 and <tool_ is no call", "2 < 3 and <tool_ is no call", []),
        (TAGGED, "<tool_call> is what it is called", "<tool_call> is what it is called", []),
        (TAGGED, "ends in <tool_", "ends in <tool_", []),
        (TAGGED, '{"name": "g"}', '{"name": "g"}', []),
        (BARE, ' {"name": "g"}', "", [G]),
        (BARE, '{"name": "else"}', '{"name": "else"}', []),
        (BARE, "{ is a brace", "{ is a brace", []),
        (BARE, 'I say {"name": "g"}', 'I say {"name": "g"}', []),
        (BARE, "", "", []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_streamed_text_however_it_is_split(
    format_: CallFormat, text: str, said: str, calls: list[ToolCall], size: int
) -> None:
    reader = CallReader(format_, NAMES)
    passed = "".join(reader.push(text[i : i + size]) for i in range(0, len(text), size))
    rest, found = reader.finish()
    assert (passed + rest, found) == (said, calls)


@pytest.mark.usefixtures("with_tools")
class TestOverHttp:
    async def test_a_call_by_the_models_own_choice(self, http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        engine.says = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        said = (await http.post("/v1/chat/completions", json=chat(tools=[tool()]))).json()["choices"][0]
        assert (said["message"]["content"], said["finish_reason"]) == ("I look.\n", "tool_calls")
        (call,) = said["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
        assert '"weather"' in engine.prompts.tokenizer.decode(engine.asked[0][0])

    async def test_no_call(self, http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        for choice in ("auto", "none"):
            body = chat(tools=[tool()], tool_choice=choice)
            said = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            assert (said["message"]["content"], said["finish_reason"]) == (engine.says, "stop")
            assert "tool_calls" not in said["message"]
            shown = '"weather"' in engine.prompts.tokenizer.decode(engine.asked[-1][0])
            assert shown == (choice == "auto")

    @pytest.mark.parametrize("named", [False, True])
    async def test_a_call_that_has_to_be(self, http: httpx.AsyncClient, engine: ScriptedEngine, named: bool) -> None:
        choice = {"type": "function", "function": {"name": "time"}} if named else "required"
        tools = [tool("time", zone={"enum": ["UTC"]}), tool("weather")]
        body = chat(tools=tools, tool_choice=choice, max_tokens=100)
        said = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        (call,) = said["message"]["tool_calls"]
        assert said["finish_reason"] == "tool_calls"
        arguments = json.loads(call["function"]["arguments"])
        assert arguments in ({"zone": "UTC"}, *([] if named else [{"city": "Paris"}, {"city": "Rome"}]))
        assert engine.prompts.tokenizer.decode(engine.asked[0][0]).endswith("assistant\n<tool_call>\n")

    async def test_streamed(self, http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        engine.says = 'Well: <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
        said = await http.post("/v1/chat/completions", json=chat(tools=[tool()], stream=True))
        chunks = [json.loads(line[6:]) for line in said.text.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "Well: "
        (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
        assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "weather")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    async def test_references_point_into_their_own_schema(self, http: httpx.AsyncClient) -> None:
        parameters = {
            "$defs": {"zone": {"enum": ["UTC"]}},
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/zone"}},
            "required": ["zone"],
            "additionalProperties": False,
        }
        offered = {"type": "function", "function": {"name": "time", "parameters": parameters}}
        body = chat(tools=[tool(), offered], tool_choice={"type": "function", "function": {"name": "time"}})
        said = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert json.loads(said["message"]["tool_calls"][0]["function"]["arguments"]) == {"zone": "UTC"}

    async def test_a_conversation_with_calls(self, http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Rome?", "name": "ann"},
            {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
        said = await http.post("/v1/chat/completions", json=chat(messages=messages, tools=[tool()]))
        assert said.status_code == 200, said.text
        text = engine.prompts.tokenizer.decode(engine.asked[0][0])
        assert "system\nBe brief." in text
        assert '{"name": "weather", "arguments": {"city": "Rome"}}' in text
        assert "tool\nsunny" in text

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"tools": [tool(), tool()]}, "tools"),
            ({"tools": [tool()], "response_format": {"type": "json_object"}}, "response_format"),
            ({"tools": [tool(x={"type": "wordle"})], "tool_choice": "required"}, None),
        ],
    )
    async def test_mistakes(self, http: httpx.AsyncClient, more: dict[str, Any], param: str | None) -> None:
        said = await http.post("/v1/chat/completions", json=chat(**more))
        assert (said.status_code, said.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].role }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 5 }}",
    ],
)
async def test_a_template_that_refuses(
    http: httpx.AsyncClient, engine: ScriptedEngine, with_tools: None, template: str
) -> None:
    engine.prompts.tokenizer.chat_template = template
    said = await http.post("/v1/chat/completions", json=chat())
    assert said.status_code == 400, said.text
    assert "template" in said.json()["error"]["message"]
