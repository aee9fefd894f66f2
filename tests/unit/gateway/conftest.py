"""What tests of the gateway share: SmolLM2's vocabulary, and a scripted model behind the endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from scripted_engine import HERMES, VOCABULARY, ScriptedEngine, client_of

from bsns.client.prompts import Prompts
from bsns.gateway.grammar import Grammars
from bsns.model.source import resolve


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return Prompts(resolve("smollm2-135m").path)


@pytest.fixture(scope="session")
def grammars(prompts: Prompts) -> Grammars:
    return Grammars(prompts.tokenizer, VOCABULARY)


@pytest.fixture
def engine(prompts: Prompts) -> ScriptedEngine:
    return ScriptedEngine(prompts)


@pytest.fixture
def with_tools(prompts: Prompts) -> Any:
    """The model's chat template has tools, as Hermes' and Qwen's do."""
    template, prompts.tokenizer.chat_template = prompts.tokenizer.chat_template, HERMES
    yield
    prompts.tokenizer.chat_template = template


@pytest.fixture
async def http(engine: ScriptedEngine, grammars: Grammars) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(engine, grammars) as client:
        yield client
