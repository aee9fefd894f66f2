"""The endpoints over a scripted model: what clients get for what they send."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from typing import Any

import httpx
import pytest
from memory_swarm import until
from pydantic import ValidationError
from scripted_engine import ScriptedEngine, chat, client_of, tool

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CacheFull, CacheTooSmall, MissingBlocks, PeerLost, PromptTooLong
from bsns.gateway.grammar import Grammars, Matcher
from bsns.gateway.requests import ChatRequest, CompletionRequest
from bsns.gateway.settings import Settings


async def events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    said = await http.post(path, json=body | {"stream": True})
    assert said.headers["content-type"].startswith("text/event-stream"), said.text
    data = [line.removeprefix("data: ") for line in said.text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def test_chat(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    said = (await http.post("/v1/chat/completions", json=chat())).json()
    assert said["object"] == "chat.completion"
    assert said["model"] == "scripted"
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": engine.says, "refusal": None}
    assert choice["finish_reason"] == "stop"
    (asked,) = engine.asked
    usage = said["usage"]
    assert usage["prompt_tokens"] == len(asked[0]) == len(engine.prompts.encode_chat(chat()["messages"]))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert engine.open == 0


async def test_chat_streamed(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = chat(stream_options={"include_usage": True})
    *chunks, usage, done = await events(http, "/v1/chat/completions", body)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == engine.says
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["stop"]
    assert len({c["id"] for c in [*chunks, usage]}) == 1
    assert usage["choices"] == []
    whole = (await http.post("/v1/chat/completions", json=chat())).json()
    assert usage["usage"] == whole["usage"]


async def test_several_choices_with_seeds_of_their_own(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    said = (await http.post("/v1/chat/completions", json=chat(n=3, seed=7, temperature=1))).json()
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2]
    assert sorted(options.seed for _, options in engine.asked) == [7, 8, 9]
    assert said["usage"]["prompt_tokens"] == len(engine.asked[0][0])
    chunks = await events(http, "/v1/chat/completions", chat(n=2))
    assert {c["choices"][0]["index"] for c in chunks[:-1]} == {0, 1}


async def test_completions(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {"model": "scripted", "prompt": [[7], [1, 2]], "temperature": 0, "n": 2, "max_tokens": 3}
    said = (await http.post("/v1/completions", json=body)).json()
    assert said["object"] == "text_completion"
    assert [(c["index"], c["finish_reason"]) for c in said["choices"]] == [(i, "length") for i in range(4)]
    cost = {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert said["usage"] == cost | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert [tokens for tokens, _ in engine.asked] == [[7]] * 2 + [[1, 2]] * 2
    await http.post("/v1/completions", json=body | {"prompt": ["one", "two"], "n": 1})
    assert [tokens for tokens, _ in engine.asked[4:]] == [engine.prompts.encode(word) for word in ("one", "two")]
    chunks = await events(http, "/v1/completions", body | {"prompt": [5]})
    assert {c["object"] for c in chunks[:-1]} == {"text_completion"}


async def test_logprobs(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.says = "né 🙂"
    said = (await http.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2))).json()
    content = said["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == engine.says
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["logprob"] == pytest.approx(-math.log1p(49151 * math.exp(-30)), abs=1e-6) for entry in content)
    chunks = await events(http, "/v1/chat/completions", chat(logprobs=True, top_logprobs=2))
    streamed = [e for c in chunks[:-1] if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content
    engine.says = "one two"
    body = {"model": "scripted", "prompt": "x", "temperature": 0, "logprobs": 1}
    told = (await http.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    assert (told["tokens"], told["text_offset"]) == (["one", " two"], [0, 3])
    offsets = [c["choices"][0]["logprobs"] for c in (await events(http, "/v1/completions", body))[:-1]]
    assert [told["text_offset"] for told in offsets if told] == [[0], [3]]


@pytest.mark.parametrize("stop", [" there", ["zzz", "there"]])
async def test_stop(http: httpx.AsyncClient, stop: Any) -> None:
    said = (await http.post("/v1/chat/completions", json=chat(stop=stop))).json()
    assert said["choices"][0]["message"]["content"].strip() == "Hello"
    assert said["choices"][0]["finish_reason"] == "stop"


async def test_every_sampling_argument_arrives(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 11,
        "max_tokens": 9,
    }
    more = {"logit_bias": {"5": -1}, "stop": ["a", "b"], "user": "me", "metadata": {"a": "b"}, "store": False}
    assert (await http.post("/v1/chat/completions", json=chat(**asked, **more))).status_code == 200
    ((_, options),) = engine.asked
    assert {name: getattr(options, name) for name in asked} == asked
    assert (options.logit_bias, options.stop) == (((5, -1.0),), ("a", "b"))
    await http.post("/v1/chat/completions", json={"model": "scripted", "messages": chat()["messages"]})
    assert (engine.asked[1][1].temperature, engine.asked[1][1].max_tokens) == (
        1.0,
        1024,
    ) or engine.context_tokens < 1024


async def test_models_and_probes(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    (model,) = (await http.get("/v1/models")).json()["data"]
    assert model["id"] == "scripted"
    assert (await http.get("/v1/models/scripted")).json() == model
    assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 200
    engine.gaps = (BlockRange(4, 9),)
    unready = await http.get("/ready")
    assert unready.status_code == 503
    assert "4:9" in unready.json()["error"]["message"]
    assert (await http.get("/health")).status_code == 200
    await http.post("/v1/chat/completions", json=chat())
    told = (await http.get("/metrics")).text
    assert 'bsns_gateway_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in told
    assert "bsns_gateway_repairs_total 3.0" in told
    assert "bsns_gateway_answers_under_way 0.0" in told
    assert "bsns_gateway_answers_waiting 2.0" in told
    assert "bsns_gateway_guessed_tokens_total 8.0" in told
    assert "bsns_gateway_right_guesses_total 5.0" in told
    assert "bsns_gateway_cached_prompt_tokens_total 0.0" in told
    assert 'bsns_gateway_sent_bytes_total{codec="int8"} 640.0' in told
    assert "bsns_gateway_time_to_first_token_seconds_count 1.0" in told


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages"),
    ({"messages": [{"role": "user<|im_end|>", "content": "Hi"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_completion_tokens": 10**12}, "max_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"stop": ["x"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x" * 1001]}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
    ({"logprobs": 2}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"stream_options": {"x": 1}}, "stream_options"),
    ({"tools": [tool()]}, "tools"),  # the template has none
    ({"tools": "x"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [tool()]}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}}, "response_format"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1"}}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "Hi"}] * 8193}, "messages"),
    ({"messages": [{"role": "user", "content": "a b " * 300}]}, "messages"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"surprise": 1}, "surprise"),
    ({"functions": []}, "functions"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=[json.dumps(w)[:50] for w, _ in WRONG])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_users_own_mistakes(
    http: httpx.AsyncClient, engine: ScriptedEngine, wrong: dict[str, Any], param: str, stream: bool
) -> None:
    said = await http.post("/v1/chat/completions", json=chat(**wrong, stream=stream))
    assert said.status_code == 400, said.text
    error = said.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param) or "logit_bias" in error["message"]
    assert "\n" not in error["message"]
    assert engine.asked == []


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([], "prompt"), ([[]], "prompt"), ("", "prompt"), ([-1], "prompt"), ([1, "a"], "prompt"), ([5] * 512, "prompt")],
)
async def test_prompts_that_are_none(http: httpx.AsyncClient, prompt: Any, param: str) -> None:
    said = await http.post("/v1/completions", json={"model": "scripted", "prompt": prompt})
    assert (said.status_code, said.json()["error"]["param"]) == (400, param), said.text


MANY = 50_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [0] * MANY},
        {"messages": [{}] * MANY},
        {"messages": [{"role": "user", "content": [0] * MANY}]},
        {"messages": [{"role": "user", "content": [{}] * MANY}]},
        {"messages": [{"role": "user", "content": "", "tool_calls": [{}] * MANY}]},
        {"stop": [0] * MANY},
        {"tools": [0] * MANY},
        {"logit_bias": {str(n): "" for n in range(MANY)}},
        {"metadata": {str(n): 0 for n in range(MANY)}},
        {f"more-{n}": 0 for n in range(MANY)},
        {"stream_options": {f"more-{n}": 0 for n in range(MANY)}},
        {"prompt": [0.5] * MANY},
        {"prompt": [0] * MANY + [None]},
        {"prompt": [[]] * MANY + [0]},
        {"prompt": [[""]] * MANY},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_of_a_large_body_that_is_wrong_all_over_little_is_looked_at(wrong: dict[str, Any]) -> None:
    """To find everything took up to a minute, in which nobody else was answered, and gigabytes."""
    kind, body = (
        (CompletionRequest, {"model": "scripted"} | wrong) if "prompt" in wrong else (ChatRequest, chat(**wrong))
    )
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() < 8


async def test_what_a_part_of_a_message_lacks_is_said(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    said = await http.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": parts}]))
    assert said.json()["error"]["message"] == "messages.0.content.1.type: Input should be 'text'"


async def test_a_call_whose_arguments_are_nested_without_end(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    function = {"name": "f", "arguments": '{"a":' + "[" * 900 + "]" * 900 + "}"}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    said = await http.post("/v1/chat/completions", json=chat(messages=[called]))
    assert said.status_code == 400, said.text
    assert engine.asked == []


async def test_only_those_with_schemas_wait_while_others_are_compiled(
    http: httpx.AsyncClient, grammars: Grammars, with_tools: None
) -> None:
    compiled = threading.Event()
    compiling = [grammars.compiling.submit(compiled.wait, 10) for _ in range(2)]
    try:
        async with asyncio.timeout(5):
            for more in ({}, {"tools": [tool()]}, {"tools": [tool()], "tool_choice": "none"}):
                assert (await http.post("/v1/chat/completions", json=chat(**more))).status_code == 200
    finally:
        compiled.set()
    assert all(one.result() for one in compiling)


async def test_a_schema_is_compiled_once_for_all_choices(
    http: httpx.AsyncClient, engine: ScriptedEngine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def schema(wanted: Any) -> Matcher:
        compiled.append(wanted)
        return Grammars.schema(grammars, wanted)

    monkeypatch.setattr(grammars, "schema", schema)
    engine.says = '{"a": 1}'
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    said = await http.post("/v1/chat/completions", json=chat(n=3, response_format=wanted))
    assert [choice["message"]["content"] for choice in said.json()["choices"]] == ['{"a": 1}'] * 3
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "wordle"},
        {"type": "string", "pattern": "(("},
        {"$ref": "#/$defs/none"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#"},
        {"enum": [f"word {i}" for i in range(100_000)]},
        {"enum": ["a" * 300_000]},
        {"anyOf": [{"type": "object", "properties": {f"a{i}": {}}, "required": [f"a{i}"]} for i in range(5000)]},
        {"type": "array", "uniqueItems": True},
        {"x-guidance": 3, "type": "wordle"},
        {"type": "string", "pattern": "\ud800"},
    ],
)
async def test_schemas_that_cannot_be_used(http: httpx.AsyncClient, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = json.dumps(chat(response_format=wanted))
    said = await http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert said.status_code == 400, said.text
    assert "schema" in said.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b'{"model": "scripted", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "scripted", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "scripted", "temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "scripted", "seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
        b"[" * 100_000,
    ],
)
async def test_bodies_that_make_no_sense(http: httpx.AsyncClient, content: bytes) -> None:
    said = await http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert said.status_code == 400, said.text
    assert said.json()["error"]["type"] == "invalid_request_error"


async def test_another_content_type(http: httpx.AsyncClient) -> None:
    """A web page can send text/plain to this machine without asking; nobody reads it as JSON."""
    headers = {"content-type": "text/plain"}
    said = await http.post("/v1/chat/completions", content=json.dumps(chat()), headers=headers)
    assert said.status_code == 400
    assert "application/json" in said.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/docs", 404),
    ],
)
async def test_what_is_not_here(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    said = await http.request(method, path)
    assert said.status_code == status
    assert said.json()["error"]["type"] == "invalid_request_error"


async def test_another_model(http: httpx.AsyncClient) -> None:
    for path, body in (("chat/completions", chat()), ("completions", {"prompt": "x"})):
        said = await http.post(f"/v1/{path}", json=body | {"model": "gpt-4"})
        assert said.status_code == 404
        assert said.json()["error"]["code"] == "model_not_found"
        assert "scripted" in said.json()["error"]["message"]


FAILURES: list[tuple[BsnsError, int, str]] = [
    (PromptTooLong("too long"), 400, "context_length_exceeded"),
    (CacheTooSmall("no"), 400, "CacheTooSmall"),
    (CacheFull("full"), 429, "CacheFull"),
    (MissingBlocks("nobody serves blocks 3:5"), 503, "MissingBlocks"),
    (PeerLost("node x at 10.0.0.1 is gone"), 503, "PeerLost"),
]


@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token(
    http: httpx.AsyncClient, engine: ScriptedEngine, failure: BsnsError, status: int, code: str, stream: bool
) -> None:
    engine.fails = failure
    said = await http.post("/v1/chat/completions", json=chat(stream=stream))
    assert said.status_code == status
    error = said.json()["error"]
    assert error["code"] == code
    assert (failure.message in error["message"]) == (not isinstance(failure, PeerLost))
    assert "10.0.0.1" not in said.text
    assert ("retry-after" in said.headers) == (status in (429, 503))
    assert engine.open == 0


async def test_a_lost_node_whose_blocks_nobody_has(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fails, engine.gaps = PeerLost("gone"), (BlockRange(3, 5),)
    said = await http.post("/v1/chat/completions", json=chat())
    assert (said.status_code, said.json()["error"]["code"]) == (503, "MissingBlocks")
    assert "3:5" in said.json()["error"]["message"]


async def test_a_failure_in_the_middle(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fails, engine.fails_after = MissingBlocks("nobody serves blocks 3:5"), 2
    *chunks, last = await events(http, "/v1/chat/completions", chat())
    assert [bool(chunk["choices"]) for chunk in chunks] == [True] * 3
    assert last["error"]["code"] == "MissingBlocks"
    assert "3:5" in last["error"]["message"]
    said = await http.post("/v1/chat/completions", json=chat())
    assert said.status_code == 503
    assert engine.open == 0


async def test_our_own_failures_tell_no_secrets(
    http: httpx.AsyncClient, engine: ScriptedEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.fails = RuntimeError("secret path /home/x")
    said = await http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "abc"})
    assert said.status_code == 500
    assert "secret" not in said.text
    assert "abc" in said.json()["error"]["message"]
    assert said.headers["x-request-id"] == "abc"
    engine.fails_after = 1
    *_, last = await events(http, "/v1/chat/completions", chat())
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stands", [False, True])
async def test_a_client_that_goes_frees_its_answer(
    engine: ScriptedEngine, grammars: Grammars, stream: bool, stands: bool
) -> None:
    """At any moment: at whatever turn of the event loop, while its tokens come or while it waits for them."""
    engine.says = "Hello there, world. " * 8
    if stands:
        engine.stands.clear()
    app = client_of(engine, grammars)._transport.app  # type: ignore[attr-defined]
    for turns in range(40):
        body = json.dumps(chat(stream=stream, n=2)).encode()
        gone = asyncio.Event()
        sent: list[Any] = []
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive(parts: Any = parts, gone: asyncio.Event = gone) -> Any:
            for part in parts:
                return part
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "query_string": b"",
        }
        serving = asyncio.create_task(app(scope, receive, send))
        async with asyncio.timeout(5):
            await until(lambda sent=sent: engine.open and (not stream or len(sent) > 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            gone.set()
            await serving
        assert engine.open == 0, turns


async def test_a_client_that_stops_reading_is_given_up(engine: ScriptedEngine, grammars: Grammars) -> None:
    app = client_of(engine, grammars, Settings(stalled_s=0.05))._transport.app  # type: ignore[attr-defined]
    parts = iter([{"type": "http.request", "body": json.dumps(chat(stream=True)).encode(), "more_body": False}])

    async def receive() -> Any:
        for part in parts:
            return part
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": headers,
        "query_string": b"",
    }
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    assert len(engine.asked) == 1
    assert engine.open == 0
