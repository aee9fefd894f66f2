"""The gateway over a real swarm, as OpenAI's own client sees it."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import CONTEXT, Running, bsns, running, says, status, swarm, tiny, until
from scripted_engine import HERMES, tool

__all__ = ["swarm", "tiny"]

MESSAGES: list[Any] = [{"role": "user", "content": "Name three rivers."}]
LONG = 30000


class Gateway:
    """A `bsns gateway` that runs beside the test, and OpenAI's client for it."""

    def __init__(self, command: Running) -> None:
        self.command = command
        listening = command.event("listening")
        self.url, self.model = listening["url"], listening["model"]
        self.client = self.openai("none")

    def openai(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def chat(self, **more: Any) -> Any:
        asked = {"model": self.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 8} | more
        return self.client.chat.completions.create(**asked)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)


@pytest.fixture(scope="module")
def with_tools(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model, whose chat template has tools."""
    directory = tmp_path_factory.mktemp("with-tools") / Path(tiny).name
    shutil.copytree(tiny, directory)
    (directory / "chat_template.jinja").write_text(HERMES)
    return str(directory)


@pytest.fixture(scope="module")
def gateway(with_tools: str, swarm: tuple[Running, str]) -> Iterator[Gateway]:
    arguments = ("gateway", with_tools, "--join", swarm[1], "--port", "0", "--stalled-s", "1", "--json")
    with running(*arguments) as command:
        yield Gateway(command)


def idle(invite: str) -> None:
    """Waits until no node holds a session."""
    until(lambda: all(node["sessions"] == 0 for node in status(invite)["nodes"]), 20, "the end of all sessions")


def busy(invite: str) -> None:
    until(lambda: all(node["sessions"] for node in status(invite)["nodes"]), 10, "a session")


def test_models(gateway: Gateway) -> None:
    assert [model.id for model in gateway.client.models.list()] == [gateway.model]
    assert gateway.client.models.retrieve(gateway.model).owned_by == "bsns"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        gateway.client.models.retrieve("gpt-4")


def test_the_next_turn_computes_what_is_new_alone(gateway: Gateway, swarm: tuple[Running, str]) -> None:
    talk: list[Any] = [{"role": "user", "content": "Tell me of a river. " * 100}]
    first = gateway.chat(messages=talk)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    idle(swarm[1])
    talk += [{"role": "assistant", "content": first.choices[0].message.content}, *MESSAGES]
    second = gateway.chat(messages=talk)
    assert second.usage.prompt_tokens_details.cached_tokens > 400


def test_greedy_chat_says_what_bsns_generate_says(gateway: Gateway, tiny: str, swarm: tuple[Running, str]) -> None:
    prompt = ("--prompt", MESSAGES[0]["content"], "--max-tokens", "12", "--json")
    expected = json.loads(bsns("generate", tiny, "--join", swarm[1], *prompt, "--raw").stdout)
    said = gateway.client.completions.create(
        model=gateway.model, prompt=MESSAGES[0]["content"], temperature=0, max_tokens=12
    )
    assert said.choices[0].text == expected["text"]
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (expected["prompt_tokens"], expected["tokens"])
    assert said.choices[0].finish_reason == "length"


def test_streamed_is_whole(gateway: Gateway) -> None:
    whole = gateway.chat(logprobs=True, top_logprobs=2)
    stream = gateway.chat(logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True})
    *chunks, usage = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert usage.usage == whole.usage
    assert whole.usage.completion_tokens == 8
    told = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.token for entry in told] == [entry.token for entry in whole.choices[0].logprobs.content]
    assert all(entry.top_logprobs[0].logprob == entry.logprob <= 0 for entry in told)


def test_seeds(gateway: Gateway) -> None:
    drawn = [gateway.chat(temperature=1, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    choices = gateway.chat(temperature=1, seed=1, n=2).choices
    assert [choice.message.content for choice in choices] == [drawn[0], drawn[2]]


def test_logit_bias_and_stop(gateway: Gateway) -> None:
    said = gateway.chat(logit_bias={"34": 100}, max_tokens=4).choices[0].message.content
    assert len(set(said)) == 1
    whole = gateway.chat(max_tokens=30).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    stopped = gateway.chat(max_tokens=30, stop=[stop]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_json(gateway: Gateway) -> None:
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["Po", "Rhine"]}, "long": {"type": "boolean"}, "km": {"const": 7}},
        "required": ["river", "long", "km"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema, "strict": True}}
    for more in ({}, {"temperature": 1, "seed": 5}):
        said = gateway.chat(response_format=wanted, max_tokens=60, **more).choices[0]
        value = json.loads(said.message.content)
        assert (set(value), value["km"], said.finish_reason) == ({"river", "long", "km"}, 7, "stop")
    impossible = {"type": "integer", "minimum": 5, "maximum": 3}
    with pytest.raises(openai.BadRequestError, match="Unsatisfiable"):
        gateway.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": impossible}})
    assert gateway.chat(response_format={"type": "json_object"}).choices[0].message.content.startswith("{")


def test_tools(gateway: Gateway, tiny: str, swarm: tuple[Running, str]) -> None:
    assert gateway.chat(tools=[tool()]).choices[0].message.tool_calls is None
    said = gateway.chat(tools=[tool(), tool("time", zone={"const": "UTC"})], tool_choice="required", max_tokens=60)
    (call,) = said.choices[0].message.tool_calls
    assert said.choices[0].finish_reason == "tool_calls"
    answered = [*MESSAGES, said.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert gateway.chat(tools=[tool()], messages=answered).choices[0].message.content
    with gateway.client.chat.completions.stream(
        model=gateway.model,
        messages=MESSAGES,
        tools=[tool()],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=60,
        temperature=0,
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_the_users_mistakes(gateway: Gateway, swarm: tuple[Running, str]) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        gateway.chat(model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        gateway.chat(messages=[{"role": "user", "content": "word " * (CONTEXT + 1)}])
    assert caught.value.code == "context_length_exceeded"
    for wrong in ({"max_tokens": -1}, {"max_tokens": 10**9}, {"stop": ["x"] * 1000}, {"n": 1000}, {"temperature": 9}):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
                gateway.chat(**wrong, stream=stream)
    with pytest.raises(openai.BadRequestError, match="no token 49152"):
        gateway.chat(logit_bias={"49152": 1})
    with pytest.raises(openai.BadRequestError, match="no token"):
        gateway.client.completions.create(model=gateway.model, prompt=[10**6])
    with pytest.raises(openai.APIStatusError, match="larger than") as large:
        gateway.chat(messages=[{"role": "user", "content": "x" * 10_000_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError, match="no encoder"):
        gateway.client.embeddings.create(model=gateway.model, input="x")
    for body in (b"{", b"\xff", b"[]", b'{"messages": 5}'):
        said = httpx.post(
            f"{gateway.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert (said.status_code, said.json()["error"]["type"]) == (400, "invalid_request_error")
    idle(swarm[1])


def test_a_client_that_goes_frees_the_cache(gateway: Gateway, swarm: tuple[Running, str]) -> None:
    stream = gateway.chat(stream=True, max_tokens=LONG)
    next(iter(stream))
    busy(swarm[1])
    stream.close()
    idle(swarm[1])
    body = {"model": gateway.model, "messages": MESSAGES, "max_tokens": LONG}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=1)
    idle(swarm[1])


def test_a_client_that_stops_reading_frees_the_cache(gateway: Gateway, swarm: tuple[Running, str]) -> None:
    body = {"model": gateway.model, "messages": MESSAGES, "max_tokens": LONG, "stream": True, "temperature": 0}
    content = json.dumps(body).encode()
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(gateway.address)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        silent.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        busy(swarm[1])
        idle(swarm[1])


def test_what_prometheus_reads(gateway: Gateway) -> None:
    gateway.chat()
    told = httpx.get(f"{gateway.url}/metrics").text
    assert 'bsns_gateway_requests_total{endpoint="/v1/chat/completions",status="200"}' in told
    assert "bsns_gateway_answers_under_way 0.0" in told
    assert httpx.get(f"{gateway.url}/ready").json() == {"status": "ok"}


def test_keys(tiny: str, swarm: tuple[Running, str], tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    word = bsns("gateway", "keys", "add", "ann", "--keys", keys, "--answers", "1").stdout.strip()
    assert "ann" in bsns("gateway", "keys", "list", "--keys", keys).stdout
    with running("gateway", tiny, "--join", swarm[1], "--port", "0", "--keys", keys, "--json") as command:
        gateway = Gateway(command)
        with pytest.raises(openai.AuthenticationError):
            gateway.chat()
        gateway.client = gateway.openai(word)
        assert gateway.chat().choices
        with pytest.raises(openai.RateLimitError, match="under way"):
            gateway.chat(n=2)
        with pytest.raises(openai.BadRequestError, match="no tools"):  # SmolLM2's template has none
            gateway.chat(tools=[tool()])
        assert bsns("gateway", "keys", "remove", "ann", "--keys", keys).returncode == 0
        with pytest.raises(openai.AuthenticationError):
            gateway.chat()


def test_options_that_are_refused(tiny: str, swarm: tuple[Running, str]) -> None:
    says(bsns("gateway", tiny, "--join", swarm[1], "--host", "0.0.0.0"), "--keys", "--public", status=2)
    says(bsns("gateway", tiny, "--join", swarm[1], "--keys", "/none"), "no key file", status=2)
    says(bsns("gateway", tiny, "--join", swarm[1], "--host", "no.such.host.invalid"), "no.such.host", status=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        says(bsns("gateway", tiny, "--join", swarm[1], "--port", port), port, status=2)


def test_an_orderly_end(tiny: str, swarm: tuple[Running, str]) -> None:
    """No new connections, and the stream that runs is told to its end."""
    with running("gateway", tiny, "--join", swarm[1], "--port", "0", "--json") as command:
        gateway = Gateway(command)
        stream = gateway.chat(stream=True, max_tokens=1500)
        chunks = iter(stream)
        next(chunks)
        command.signal(signal.SIGTERM)
        until(lambda: not _listens(gateway.address), 5, "the end of listening")
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert command.finish(10).returncode == 130
    command.family.left_nothing()


def test_who_only_watches_does_not_hold_up_the_end(tiny: str, swarm: tuple[Running, str]) -> None:
    with running("gateway", tiny, "--join", swarm[1], "--port", "0", "--json") as command:
        gateway = Gateway(command)
        with httpx.stream("GET", f"{gateway.url}/dashboard/events", timeout=30) as said:
            assert next(said.iter_lines()) == "event: swarm"
            command.signal(signal.SIGTERM)
            assert command.finish(8).returncode == 130


def test_streams_that_do_not_end_in_time(tiny: str, swarm: tuple[Running, str]) -> None:
    with running("gateway", tiny, "--join", swarm[1], "--port", "0", "--drain-s", "1", "--json") as command:
        chunks = iter(Gateway(command).chat(stream=True, max_tokens=LONG))
        next(chunks)
        command.signal(signal.SIGTERM)
        assert command.finish(10).returncode == 130
        with pytest.raises(openai.APIConnectionError):
            for _ in chunks:
                pass
    command.family.left_nothing()
    idle(swarm[1])


def test_a_second_signal_leaves_at_once(tiny: str, swarm: tuple[Running, str]) -> None:
    with running("gateway", tiny, "--join", swarm[1], "--port", "0", "--json") as command:
        gateway = Gateway(command)
        stream = gateway.chat(stream=True, max_tokens=LONG)
        next(iter(stream))
        command.signal(signal.SIGTERM)
        until(lambda: not _listens(gateway.address), 5, "the end of listening")
        time.sleep(0.4)  # a signal that comes sooner is the same one, passed on (console.IMPATIENT_S)
        command.signal(signal.SIGTERM)
        assert command.finish(3).returncode == 130
    command.family.gone()
    idle(swarm[1])


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def test_up_with_a_gateway(tiny: str) -> None:
    with running("up", tiny, "--nodes", "2", "--gateway", "--gateway-port", "0", "--json") as command:
        command.event("serving")
        assert Gateway(command).chat().choices
        command.signal(signal.SIGTERM)
        assert command.finish(20).returncode == 130
    command.family.left_nothing()


def test_a_node_that_is_lost_in_the_middle(tiny: str) -> None:
    """The stream ends with an error that names the blocks; so does what comes after it."""
    with running("serve", tiny, "--blocks", "0:2", "--threads", "1", "--json") as first:
        invite = first.event("serving")["invite"]
        with running("serve", tiny, "--blocks", "2:4", "--join", invite, "--threads", "1", "--json") as second:
            second.event("serving")
            options = ("--join", invite, "--port", "0", "--deadline-s", "3", "--json")
            with running("gateway", tiny, *options) as command:
                gateway = Gateway(command)
                chunks = iter(gateway.chat(stream=True, max_tokens=LONG))
                next(chunks)
                second.kill()
                with pytest.raises(openai.APIError, match="2:4") as caught:
                    for _ in chunks:
                        pass
                assert caught.value.code == "MissingBlocks"
                unready = until(lambda: _unless_ready(gateway.url), 30, "the news of the loss")
                assert "2:4" in unready["error"]["message"]
                with pytest.raises(openai.InternalServerError, match="2:4") as refused:
                    gateway.chat()
                assert refused.value.status_code == 503


def _unless_ready(url: str) -> Any:
    said = httpx.get(f"{url}/ready")
    return said.json() if said.status_code == 503 else None
