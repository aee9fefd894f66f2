"""The endpoints, as OpenAI has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

import bsns
from bsns.client.generate import Piece
from bsns.core.errors import BsnsError, MissingBlocks
from bsns.gateway.answering import Answers, Ask, Usage
from bsns.gateway.chat import constraint_of, prompt_of
from bsns.gateway.engine import Engine
from bsns.gateway.errors import ApiError, ErrorBody, bad_request, from_bsns, internal, unserved
from bsns.gateway.gate import Caller, Gate
from bsns.gateway.grammar import Grammars
from bsns.gateway.limits import Limits
from bsns.gateway.metrics import Metrics
from bsns.gateway.replies import Choice, Reply
from bsns.gateway.requests import (
    CHAT_TOKENS,
    COMPLETION_TOKENS,
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    Sampling,
)
from bsns.gateway.settings import Settings
from bsns.gateway.tools import CallFormat, CallReader

log = structlog.get_logger(__name__)
_FIELD = re.compile(r"[a-z_]\w*|\d+")
T = TypeVar("T")

REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


def create_app(engine: Engine, grammars: Grammars, settings: Settings) -> FastAPI:
    """An ASGI application that answers with this engine."""
    metrics, limits, created = Metrics(lambda: engine.repairs), Limits(), int(time.time())
    app = FastAPI(
        title="BSNS gateway",
        version=bsns.__version__,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=REFUSALS,
    )
    desk = _Desk(engine, grammars, metrics, limits, settings)
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
        endpoints=frozenset(getattr(route, "path", "") for route in app.routes),
    )
    return app


@dataclass(frozen=True, slots=True)
class _Desk:
    """Takes requests for completions and sees to their replies."""

    engine: Engine
    grammars: Grammars
    metrics: Metrics
    limits: Limits
    settings: Settings

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not served here."""
        if name != self.engine.name:
            message = f"there is no model {name!r} here; this gateway serves {self.engine.name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        self.check_model(body.model)
        wanted = body.max_completion_tokens or body.max_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        options = body.options(wanted, CHAT_TOKENS, self.engine.context_tokens, logprobs)
        prompt = await asyncio.to_thread(prompt_of, body, self.engine.prompts)
        first, asks = Ask(prompt.tokens, options), list[Ask]()
        for number in range(body.n or 1):
            asks.append(first.choice(number, await asyncio.to_thread(constraint_of, body, self.grammars)))
        format_ = CallFormat("") if prompt.called else prompt.calls

        def choice(index: int) -> Choice:
            reader = CallReader(format_, prompt.names) if format_ is not None else None
            return Choice(index, self.grammars.bytes_of, self.engine.prompts.end_tokens, reader)

        return await self._reply(request, body, asks, choice, Reply(self.engine.name, True, logprobs is not None))

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        self.check_model(body.model)
        options = body.options(body.max_tokens, COMPLETION_TOKENS, self.engine.context_tokens, body.logprobs)
        prompts, asks = body.prompts(), list[Ask]()
        if len(prompts) * (body.n or 1) > MOST_CHOICES:
            raise bad_request(f"a request has up to {MOST_CHOICES} choices: prompts times n", "n")
        for prompt in prompts:
            tokens = await asyncio.to_thread(self.engine.prompts.encode, prompt) if isinstance(prompt, str) else prompt
            if min(tokens, default=0) < 0:
                raise bad_request("a prompt's tokens are numbers from 0 on", "prompt")
            asks += [Ask(tokens, options).choice(number, None) for number in range(body.n or 1)]

        def choice(index: int) -> Choice:
            return Choice(index, self.grammars.bytes_of, self.engine.prompts.end_tokens)

        reply = Reply(self.engine.name, False, body.logprobs is not None)
        return await self._reply(request, body, asks, choice, reply)

    async def _reply(
        self, request: Request, body: Sampling, asks: list[Ask], choice: Callable[[int], Choice], reply: Reply
    ) -> Response:
        caller: Caller = request.state.caller
        answers = Answers(self.engine, asks, self.metrics)
        # a prompt that several choices share is read once for the books
        answers.usage.prompt_tokens = sum(
            len(tokens) for tokens in {id(ask.tokens): ask.tokens for ask in asks}.values()
        )
        choices = [choice(i) for i in range(len(asks))]
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._room(caller, len(asks)))
            pieces = answers.pieces()
            stack.push_async_callback(pieces.aclose)
            # Until the first piece is there, whatever goes wrong has a status of its own.
            first = await unless_gone(request, anext(pieces))
            self.metrics.tokens.labels("in").inc(answers.usage.prompt_tokens)
            if body.stream:
                events = self._events(body, answers.usage, _with(first, pieces), choices, reply)
                response: Response = _Stream(events, stack.pop_all(), self.settings.stalled_s)
            else:

                async def see_through() -> None:
                    async for index, piece in _with(first, pieces):
                        choices[index].push(piece)

                await unless_gone(request, see_through())
                response = JSONResponse(reply.whole(choices, answers.usage))
        return response

    async def _events(
        self,
        body: Sampling,
        usage: Usage,
        pieces: AsyncGenerator[tuple[int, Piece], None],
        choices: list[Choice],
        reply: Reply,
    ) -> AsyncGenerator[dict[str, str], None]:
        """Server-sent events; a failure on the way is one of them, and the last."""
        try:
            if reply.chat:
                for choice in choices:
                    yield _event(reply.opening(choice.index))
            async for index, piece in pieces:
                choice = choices[index]
                text, calls, told = choice.push(piece)
                if text or calls or told or choice.finish:
                    yield _event(reply.chunk(choice, text, calls, told))
        except BsnsError as error:
            yield _event((await self.told(error)).body())
            return
        except Exception:
            log.exception("a stream failed")
            yield _event(internal(str(structlog.contextvars.get_contextvars().get("request_id"))).body())
            return
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(reply.closing(usage))
        yield {"data": "[DONE]"}

    async def told(self, error: BsnsError) -> ApiError:
        """What the client is told; the log has the rest."""
        told = from_bsns(error)
        if told.status_code == 503:
            log.warning("the swarm failed a request", code=error.code, why=error.message)
            if not isinstance(error, MissingBlocks) and (gaps := await self.engine.missing()):
                return unserved(gaps, self.engine.name)
        return told

    @contextlib.contextmanager
    def _room(self, caller: Caller, answers: int) -> Iterator[None]:
        """Holds a caller's share of answers under way. Raises ApiError where it would be too large."""
        if not self.limits.begin(caller.name, caller.allowance, answers):
            raise ApiError(
                429,
                f"this key may have {caller.allowance.answers} answers under way",
                type_="rate_limit_error",
                code="concurrency_limit_exceeded",
                retry_after_s=1,
            )
        try:
            yield
        finally:
            self.limits.end(caller.name, answers)


class _Stream(EventSourceResponse):
    """Events that hold something, which is let go of however the stream ends, even before it has begun."""

    def __init__(
        self, events: AsyncGenerator[dict[str, str], None], held: contextlib.AsyncExitStack, stalled_s: float
    ) -> None:
        super().__init__(events, send_timeout=stalled_s, sep="\n")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                log.info("a client stopped reading its stream, and is given up")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """See it through, and give it up when the client goes. Raises ApiError then, and what the work does."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, going), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone")  # nobody reads it but the log; the number is nginx's
        return working.result()
    finally:
        for task in (working, going):
            task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)


async def _with(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    yield first
    async for item in rest:
        yield item


def _event(value: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False, separators=(",", ":"))}


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of what is wrong, in one line."""
    first = error.errors()[0]
    # Behind a field with several types come pydantic's names for them.
    where = [*takewhile(lambda part: _FIELD.fullmatch(part) and part != "str", map(str, first["loc"][1:]))]
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
