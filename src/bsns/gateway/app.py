"""The endpoints, as OpenAI has them."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import bsns
from bsns.core.errors import BsnsError
from bsns.gateway.dashboard import Dashboard
from bsns.gateway.desk import Desk
from bsns.gateway.engine import Engine
from bsns.gateway.errors import ApiError, ErrorBody, bad_request, unserved
from bsns.gateway.gate import OPEN_PATHS, Gate
from bsns.gateway.grammar import Grammars
from bsns.gateway.limits import Limits
from bsns.gateway.lookout import Lookout
from bsns.gateway.metrics import Metrics
from bsns.gateway.page import page_files
from bsns.gateway.requests import ChatRequest, CompletionRequest
from bsns.gateway.running import RunningAnswers
from bsns.gateway.settings import Settings

REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
_FIELD = re.compile(r"[a-z_]\w*|\d+")
_TYPES = frozenset({"str", "int", "float", "bool"})


def create_app(engine: Engine, grammars: Grammars, settings: Settings) -> FastAPI:
    """An ASGI application that answers with this engine. Its server sets `state.closing` when it is to end."""
    metrics, limits, created = Metrics(engine), Limits(), int(time.time())
    app = FastAPI(
        title="BSNS gateway",
        version=bsns.__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=REFUSALS,
    )
    running, files = RunningAnswers(), page_files()
    desk = Desk(engine, grammars, metrics, limits, settings, running)
    app.state.closing = asyncio.Event()
    Dashboard(Lookout(engine, running), settings, app.state.closing).install(app, files)
    model = {"id": engine.name, "object": "model", "created": created, "owned_by": "bsns"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The swarm has the whole model; otherwise 503 names what is missing."""
        if gaps := await engine.missing():
            raise unserved(gaps, engine.name)
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """In Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        desk.check_model(model_id)
        return model

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await desk.chat(request, body)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await desk.complete(request, body)

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ApiError(
            404,
            "this swarm hosts a language model and no encoder: it has no embeddings",
            code="embeddings_not_supported",
        )

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        """Whatever the framework refuses, in OpenAI's shape."""
        if isinstance(error, ApiError):
            return error.response()
        what = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} takes no {request.method}"}
        told = ApiError(error.status_code, what.get(error.status_code, str(error.detail)))
        response = told.response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    @app.exception_handler(BsnsError)
    async def on_bsns(request: Request, error: BsnsError) -> JSONResponse:
        return (await desk.told(error)).response()

    app.add_middleware(
        Gate,
        keys=settings.keys,
        limits=limits,
        metrics=metrics,
        most_body_bytes=settings.most_body_bytes,
        local_only=settings.local_only,
        open_paths=OPEN_PATHS | files.keys(),
        endpoints=frozenset(getattr(route, "path", "") for route in app.routes),
    )
    return app


def _invalid(error: RequestValidationError) -> ApiError:
    """What is wrong, in one line: where a value may have several types, what the one says that it came closest to."""
    wrong = error.errors()
    first = max((other for other in wrong if other["loc"][:2] == wrong[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    # Behind a field with several types come pydantic's names for them.
    where = [part for part in map(str, first["loc"][1:]) if _FIELD.fullmatch(part) and part not in _TYPES]
    param = where[0] if where else None
    if first["type"] == "json_invalid":
        return bad_request(
            f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        return bad_request(f"unrecognized request argument: {'.'.join(where)}", param, "unknown_parameter")
    if not where:
        return bad_request(f"the body has to be a JSON object, sent as application/json: {first['msg']}")
    return bad_request(f"{'.'.join(where)}: {first['msg']}", param, "invalid_value")
