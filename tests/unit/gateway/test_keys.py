"""The key file, and who comes through the gate."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from memory_swarm import until
from scripted_engine import ScriptedEngine, chat, client_of

from bsns.cli.logs import log_to_stderr
from bsns.core.errors import BadOption
from bsns.gateway.grammar import Grammars
from bsns.gateway.keys import KeyRing, add_key, read_keys, remove_key
from bsns.gateway.limits import Allowance
from bsns.gateway.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_file_holds_no_keys_and_is_its_owners(file: Path) -> None:
    word = add_key(file, "ann", Allowance(5, 2))
    other = add_key(file, "bob")
    assert word != other
    assert word.removeprefix("bsns-") not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [(key.name, key.allowance) for key in read_keys(file)] == [("ann", Allowance(5, 2)), ("bob", Allowance())]
    ring = KeyRing(file)
    found = ring.find(word)
    assert found is not None
    assert found.name == "ann"
    assert ring.find(word + "x") is ring.find("") is ring.find("ann") is None
    assert os.listdir(file.parent) == ["keys.json"]


def test_a_removed_key_stops_at_once(file: Path) -> None:
    word, other = add_key(file, "ann"), add_key(file, "bob")
    ring = KeyRing(file)
    remove_key(file, "ann")
    assert ring.find(word) is None
    assert ring.find(other) is not None
    file.unlink()
    with pytest.raises(BadOption, match="no key file"):
        ring.find(other)


def test_mistakes(file: Path) -> None:
    with pytest.raises(BadOption, match="no key file"):
        read_keys(file)
    add_key(file, "ann")
    with pytest.raises(BadOption, match="already"):
        add_key(file, "ann")
    with pytest.raises(BadOption, match="no name"):
        add_key(file, "a\nb")
    with pytest.raises(BadOption, match="no key of the name"):
        remove_key(file, "bob")
    with pytest.raises(BadOption, match="cannot be written"):
        add_key(file.parent / "none" / "keys.json", "ann")
    file.chmod(0o666)
    with pytest.raises(BadOption, match="chmod 600"):
        KeyRing(file)
    file.chmod(0o600)
    file.write_text("[{}]")
    with pytest.raises(BadOption, match="cannot be read"):
        KeyRing(file)


def bearer(word: str) -> dict[str, str]:
    return {"authorization": f"Bearer {word}"}


async def test_who_comes_in(file: Path, engine: ScriptedEngine, grammars: Grammars) -> None:
    word = add_key(file, "ann")
    async with client_of(engine, grammars, Settings(KeyRing(file))) as http:
        for headers in ({}, bearer("bsns-wrong"), {"authorization": f"Basic {word}"}, bearer("")):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
                said = await http.get(path, headers=headers)
                assert said.status_code == 401
                assert said.json()["error"]["code"] == "invalid_api_key"
                assert said.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health")).status_code == (await http.get("/ready")).status_code == 200
        assert (await http.post("/v1/chat/completions", json=chat(), headers=bearer(word))).status_code == 200
        file.unlink()  # noqa: ASYNC240
        assert (await http.get("/v1/models", headers=bearer(word))).status_code == 503


async def test_requests_a_minute(file: Path, engine: ScriptedEngine, grammars: Grammars) -> None:
    word, other = add_key(file, "ann", Allowance(requests_per_minute=2)), add_key(file, "bob")
    async with client_of(engine, grammars, Settings(KeyRing(file))) as http:
        said = [await http.get("/v1/models", headers=bearer(word)) for _ in range(3)]
        assert [each.status_code for each in said] == [200, 200, 429]
        assert 25 <= int(said[2].headers["retry-after"]) <= 31
        assert said[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert (await http.get("/v1/models", headers=bearer(other))).status_code == 200


async def test_answers_at_once(file: Path, engine: ScriptedEngine, grammars: Grammars) -> None:
    word = add_key(file, "ann", Allowance(answers=2))
    engine.stands.clear()
    async with client_of(engine, grammars, Settings(KeyRing(file))) as http:

        async def ask(**more: Any) -> httpx.Response:
            return await http.post("/v1/chat/completions", json=chat(**more), headers=bearer(word))

        wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wordle"}}}
        assert (await ask(n=3, response_format=wrong)).status_code == 429, "before anything is done for it"
        assert (await ask(n=2, response_format=wrong)).status_code == 400
        first = asyncio.create_task(ask(n=2))
        await until(lambda: engine.open == 2)
        refused = await ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
        engine.stands.set()
        assert (await first).status_code == 200
        assert (await ask(n=2, stream=True)).status_code == 200
        assert (await ask(n=2)).status_code == 200


async def test_only_this_machine(engine: ScriptedEngine, grammars: Grammars) -> None:
    async with client_of(engine, grammars, Settings(local_only=True)) as http:
        for host in ("localhost", "localhost:8080", "127.0.0.1:80", "[::1]:8080", "[::1]"):
            assert (await http.get("/v1/models", headers={"host": host})).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1:8080", "127.0.0.1.evil.example", ""):
            assert (await http.get("/v1/models", headers={"host": host})).status_code == 403


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large(engine: ScriptedEngine, grammars: Grammars, announced: bool) -> None:
    async def parts() -> Any:
        for _ in range(160):
            yield b" " * 65536

    content = b" " * 10_485_760 if announced else parts()
    async with client_of(engine, grammars, Settings(most_body_bytes=4096)) as http:
        headers = {"content-type": "application/json"}
        said = await http.post("/v1/chat/completions", content=content, headers=headers)
        assert said.status_code == 413
        assert said.json()["error"]["code"] == "request_too_large"
        assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_request_ids(engine: ScriptedEngine, grammars: Grammars) -> None:
    async with client_of(engine, grammars) as http:
        given = [(await http.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert given[0] != given[1]
        assert (await http.get("/health", headers={"x-request-id": "a-1"})).headers["x-request-id"] == "a-1"
        hostile = (await http.get("/health", headers={"x-request-id": "a b\x1b[31m"})).headers["x-request-id"]
        assert hostile.isalnum()


async def test_logs_hold_no_secret(
    file: Path, engine: ScriptedEngine, grammars: Grammars, capfd: pytest.CaptureFixture[str]
) -> None:
    word = add_key(file, "ann")
    before = structlog.get_config()
    log_to_stderr(logging.INFO)
    try:
        async with client_of(engine, grammars, Settings(KeyRing(file))) as http:
            body = chat(messages=[{"role": "user", "content": "my private question"}], temperature=-1)
            await http.post("/v1/chat/completions?key=hidden", json=body, headers=bearer(word))
            await http.post("/v1/chat/completions", json=body | {"temperature": 1}, headers=bearer(word))
    finally:
        structlog.configure(**before)
    said = "".join(capfd.readouterr())
    assert "ann" in said
    assert all(secret not in said for secret in (word, "private", "hidden", "Hello there"))
