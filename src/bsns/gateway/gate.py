"""The gate before the endpoints: who may come in, how often, and with how large a body.

It gives every request an id, which the reply carries and the log names, and counts it. Keys and prompts are not logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsns.core.errors import BsnsError
from bsns.core.hosts import names_this_machine
from bsns.gateway.errors import ApiError, internal
from bsns.gateway.keys import KeyRing
from bsns.gateway.limits import Allowance, Limits
from bsns.gateway.metrics import Metrics

log = structlog.get_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""For those who watch over processes; they tell nothing that is secret."""
BODY_S = 30.0
"""How long each piece of a body may take to come."""
MOST_DRAINED_BYTES, DRAIN_S = 16 << 20, 5.0
"""So much of a body that is refused is read and dropped, for so long."""
_REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key's name, or "" where no keys are needed."""

    name: str
    allowance: Allowance


class Gate:
    """ASGI middleware. Endpoints find the `Caller` in `request.state.caller`; the ids of sessions that they put into
    `request.state.sessions` are logged."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        limits: Limits,
        metrics: Metrics,
        most_body_bytes: int,
        local_only: bool,
        open_paths: frozenset[str],
        endpoints: frozenset[str],
    ) -> None:
        """`local_only`: requests must name this machine as their host, so that no web page's own name, pointed here,
        lets a browser in (DNS rebinding). `open_paths` want no key. `endpoints` are counted by their names."""
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._most_body_bytes = most_body_bytes
        self._local_only = local_only
        self._open_paths = open_paths
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, began_s = Headers(scope=scope), scope["path"], time.monotonic()
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        status = 0
        caller, sessions = Caller("", Allowance()), list[str]()
        state = scope.setdefault("state", {})
        state["sessions"] = sessions

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                try:
                    caller = state["caller"] = self._admit(headers, path)
                except ApiError as error:
                    await _drain(receive)
                    await error.response()(scope, receive, tell)
                else:
                    await self._app(scope, self._limited(receive), tell)
            except Exception:
                log.exception("a request failed")
                if not status:
                    await internal(request_id).response()(scope, receive, tell)
            finally:
                endpoint = path if path in self._endpoints else "other"
                self._metrics.requests.labels(endpoint, str(status)).inc()
                ms = round((time.monotonic() - began_s) * 1e3, 1)
                about = {"sessions": sessions} if sessions else {}
                log.info(
                    "request", method=scope["method"], endpoint=endpoint, status=status, key=caller.name, ms=ms, **about
                )

    def _admit(self, headers: Headers, path: str) -> Caller:
        """Raises ApiError."""
        if self._local_only and not names_this_machine(headers.get("host", "")):
            raise ApiError(403, "this gateway answers this machine only, by the name localhost or 127.0.0.1")
        if path in self._open_paths:
            return Caller("", Allowance())
        caller = self._caller(headers)
        wait_s = self._limits.ask(caller.name, caller.allowance, time.monotonic())
        if wait_s:
            raise ApiError(
                429,
                f"this key may ask {caller.allowance.requests_per_minute} times a minute",
                type_="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=int(wait_s) + 1,
            )
        return caller

    def _caller(self, headers: Headers) -> Caller:
        if self._keys is None:
            return Caller("", Allowance())
        kind, _, word = headers.get("authorization", "").partition(" ")
        try:
            key = self._keys.find(word.strip()) if kind.lower() == "bearer" else None
        except BsnsError as error:
            log.error("the key file cannot be used", why=error.message)
            raise ApiError(503, "the gateway cannot check keys now", type_="server_error") from error
        if key is None:
            raise ApiError(
                401,
                "no valid API key; send Authorization: Bearer KEY",
                type_="authentication_error",
                code="invalid_api_key",
            )
        return Caller(key.name, key.allowance)

    def _limited(self, receive: Receive) -> Receive:
        """The body as it comes; where it grows too large or does not come, this raises ApiError, which the application
        passes on."""
        read, more = 0, True

        async def limited() -> Message:
            nonlocal read, more
            try:
                async with asyncio.timeout(BODY_S if more else None):  # behind the body comes the client's going
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the request's body did not come within {BODY_S:g} s") from None
            read, more = read + len(message.get("body", b"")), message.get("more_body", False)
            if read > self._most_body_bytes:
                if more:
                    await _drain(receive)
                raise ApiError(
                    413, f"the request is larger than {self._most_body_bytes} bytes", code="request_too_large"
                )
            return message

        return limited


async def _drain(receive: Receive) -> None:
    """Read what is left of a body, in reason: a client that is still sending may not hear our answer."""
    read, more = 0, True
    with contextlib.suppress(TimeoutError):  # then it is answered all the same
        async with asyncio.timeout(DRAIN_S):
            while more and read < MOST_DRAINED_BYTES:
                message = await receive()
                read, more = read + len(message.get("body", b"")), message.get("more_body", False)
