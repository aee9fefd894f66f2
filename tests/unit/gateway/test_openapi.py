"""Requests made from the gateway's own OpenAPI description, right and wrong: it answers each as it says it does."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from scripted_engine import ScriptedEngine

from bsns.client.prompts import Prompts
from bsns.gateway.app import create_app
from bsns.gateway.grammar import Grammars
from bsns.gateway.settings import Settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_it_answers_as_described(prompts: Prompts, grammars: Grammars, mode: GenerationMode) -> None:
    async def engine() -> ScriptedEngine:
        return ScriptedEngine(prompts)

    app = create_app(asyncio.run(engine()), grammars, Settings())
    asked = set()
    for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=40 if operation.method == "post" else 5,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)
            asked.add(case.operation.label)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with what takes no arguments
            check()
    assert {"POST /v1/chat/completions", "POST /v1/completions"} <= asked
