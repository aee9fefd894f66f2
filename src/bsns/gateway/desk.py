"""Requests for completions, from what was asked to the reply, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from bsns.client.pieces import Piece
from bsns.core.errors import BsnsError, MissingBlocks
from bsns.gateway.answering import Answers, Ask, Usage
from bsns.gateway.chat import constraint_of, prompt_of
from bsns.gateway.engine import Engine
from bsns.gateway.errors import ApiError, bad_request, from_bsns, internal, unserved
from bsns.gateway.gate import Caller
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
from bsns.gateway.running import RunningAnswers
from bsns.gateway.settings import Settings
from bsns.gateway.tools import CallFormat, CallReader

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Desk:
    """Takes requests for completions and sees to their replies."""

    engine: Engine
    grammars: Grammars
    metrics: Metrics
    limits: Limits
    settings: Settings
    running: RunningAnswers

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not served here."""
        if name != self.engine.name:
            message = f"there is no model {name[:200]!r} here; this gateway serves {self.engine.name}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        self.check_model(body.model)
        wanted = body.max_completion_tokens or body.max_tokens
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        options = body.options(wanted, CHAT_TOKENS, self.engine.context_tokens, logprobs)
        choices = body.n or 1
        async with self._room(request, choices) as held:
            prompt = await asyncio.to_thread(prompt_of, body, self.engine.prompts)
            self._check_length(prompt.tokens, "messages")
            constraint = None
            if prompt.called or body.response_format:  # others do not wait for those whose schemas take long
                loop = asyncio.get_running_loop()
                compiled = loop.run_in_executor(self.grammars.compiling, constraint_of, body, self.grammars)
                constraint = await unless_gone(request, compiled)
            first = Ask(prompt.tokens, options)
            asks = [first.choice(number, constraint and constraint.copy()) for number in range(choices)]
            format_ = CallFormat("") if prompt.called else prompt.calls

            def choice(index: int) -> Choice:
                reader = CallReader(format_, prompt.names) if format_ is not None else None
                return Choice(index, self.grammars.bytes_of, self.engine.prompts.end_tokens, reader)

            reply = Reply(self.engine.name, True, logprobs is not None)
            return await self._reply(request, body, asks, len(prompt.tokens), choice, reply, held)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        self.check_model(body.model)
        options = body.options(body.max_tokens, COMPLETION_TOKENS, self.engine.context_tokens, body.logprobs)
        prompts, asks, prompt_tokens = body.prompts(), list[Ask](), 0
        choices = len(prompts) * (body.n or 1)
        if choices > MOST_CHOICES:
            raise bad_request(f"a request has up to {MOST_CHOICES} choices: prompts times n", "n")
        async with self._room(request, choices) as held:
            for prompt in prompts:
                if isinstance(prompt, str):
                    tokens = await asyncio.to_thread(self.engine.prompts.encode, prompt)
                else:
                    tokens = prompt
                if min(tokens, default=0) < 0:
                    raise bad_request("a prompt's tokens are numbers from 0 on", "prompt")
                self._check_length(tokens, "prompt")
                prompt_tokens += len(tokens)
                asks += [Ask(tokens, options).choice(number, None) for number in range(body.n or 1)]

            def choice(index: int) -> Choice:
                return Choice(index, self.grammars.bytes_of, self.engine.prompts.end_tokens)

            reply = Reply(self.engine.name, False, body.logprobs is not None)
            return await self._reply(request, body, asks, prompt_tokens, choice, reply, held)

    def _check_length(self, tokens: list[int], param: str) -> None:
        """Raises ApiError where there is no room for an answer behind a prompt."""
        if len(tokens) >= (most := self.engine.context_tokens):
            message = f"the prompt has {len(tokens)} tokens, the model's context holds {most}; shorten it"
            raise bad_request(message, param, "context_length_exceeded")

    async def _reply(
        self,
        request: Request,
        body: Sampling,
        asks: list[Ask],
        prompt_tokens: int,
        choice: Callable[[int], Choice],
        reply: Reply,
        held: contextlib.AsyncExitStack,
    ) -> Response:
        """`prompt_tokens`: of all prompts, each counted once however many choices it has. A stream takes over what is
        `held`."""
        caller: Caller = request.state.caller
        answers = Answers(
            self.engine, asks, self.metrics, Usage(prompt_tokens), caller.name, request.state.sessions, self.running
        )
        choices = [choice(i) for i in range(len(asks))]
        pieces = answers.pieces()
        held.push_async_callback(pieces.aclose)
        # Until the first piece is there, whatever goes wrong has a status of its own.
        first = await unless_gone(request, anext(pieces))
        self.metrics.tokens.labels("in").inc(answers.usage.prompt_tokens)
        if body.stream:
            events = self._events(body, answers.usage, _with(first, pieces), choices, reply)
            return EventStream(events, held.pop_all(), self.settings.stalled_s)

        async def see_through() -> None:
            async for index, piece in _with(first, pieces):
                choices[index].push(piece)

        await unless_gone(request, see_through())
        return JSONResponse(reply.whole(choices, answers.usage))

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

    @contextlib.asynccontextmanager
    async def _room(self, request: Request, answers: int) -> AsyncIterator[contextlib.AsyncExitStack]:
        """Holds a caller's share of answers under way, or what this yields does. Raises ApiError where it would be too
        large."""
        caller: Caller = request.state.caller
        if not self.limits.begin(caller.name, caller.allowance, answers):
            raise ApiError(
                429,
                f"this key may have {caller.allowance.answers} answers under way",
                type_="rate_limit_error",
                code="concurrency_limit_exceeded",
                retry_after_s=1,
            )
        async with contextlib.AsyncExitStack() as held:
            held.callback(self.limits.end, caller.name, answers)
            yield held


class EventStream(EventSourceResponse):
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
