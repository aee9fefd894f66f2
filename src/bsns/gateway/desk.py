"""Requests for completions, from what was asked to the reply, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
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

        reply = Reply(self.engine.name, True, logprobs is not None)
        return await self._reply(request, body, asks, len(prompt.tokens), choice, reply)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        self.check_model(body.model)
        options = body.options(body.max_tokens, COMPLETION_TOKENS, self.engine.context_tokens, body.logprobs)
        prompts, asks, prompt_tokens = body.prompts(), list[Ask](), 0
        if len(prompts) * (body.n or 1) > MOST_CHOICES:
            raise bad_request(f"a request has up to {MOST_CHOICES} choices: prompts times n", "n")
        for prompt in prompts:
            tokens = await asyncio.to_thread(self.engine.prompts.encode, prompt) if isinstance(prompt, str) else prompt
            if min(tokens, default=0) < 0:
                raise bad_request("a prompt's tokens are numbers from 0 on", "prompt")
            prompt_tokens += len(tokens)
            asks += [Ask(tokens, options).choice(number, None) for number in range(body.n or 1)]

        def choice(index: int) -> Choice:
            return Choice(index, self.grammars.bytes_of, self.engine.prompts.end_tokens)

        reply = Reply(self.engine.name, False, body.logprobs is not None)
        return await self._reply(request, body, asks, prompt_tokens, choice, reply)

    async def _reply(
        self,
        request: Request,
        body: Sampling,
        asks: list[Ask],
        prompt_tokens: int,
        choice: Callable[[int], Choice],
        reply: Reply,
    ) -> Response:
        """`prompt_tokens`: of all prompts, each counted once however many choices it has."""
        caller: Caller = request.state.caller
        answers = Answers(
            self.engine, asks, self.metrics, Usage(prompt_tokens), caller.name, request.state.sessions, self.running
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
                response: Response = EventStream(events, stack.pop_all(), self.settings.stalled_s)
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
