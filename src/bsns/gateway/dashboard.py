"""The dashboard's endpoints: its page, the swarm's state, and the state as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping

import structlog
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from bsns.core.errors import BsnsError
from bsns.gateway.desk import EventStream
from bsns.gateway.errors import ApiError
from bsns.gateway.gate import Caller
from bsns.gateway.lookout import Lookout, Sight, Viewer
from bsns.gateway.page import HEADERS, PageFile
from bsns.gateway.settings import Settings
from bsns.gateway.state import DashboardState

log = structlog.get_logger(__name__)

MOST_STREAMS, MOST_OF_A_KEY = 64, 8
"""Of states at once: in all, and of each key."""
STREAM_LOOKS = 120
"""A stream ends after so many, and its reader asks again: so a key that was removed is not shown more for ever."""


class Dashboard:
    """Serves what the lookout sees."""

    def __init__(self, lookout: Lookout, settings: Settings, closing: asyncio.Event) -> None:
        """`closing` is set when the gateway ends: whoever only watches shall not hold it up."""
        self._lookout, self._settings, self._closing = lookout, settings, closing
        self._streams: Counter[str] = Counter()

    def install(self, app: FastAPI, files: Mapping[str, PageFile]) -> None:
        """Give an application the endpoints; those of `files` want no key."""
        for path, file in files.items():
            app.add_api_route(path, _serving(file), include_in_schema=False, methods=["GET", "HEAD"])

        @app.get("/dashboard/state")
        async def state(request: Request) -> DashboardState:
            """What the dashboard shows: nodes, links, answers under way, plan, shape."""
            return (await self._lookout.sight()).state(self._viewer(request))

        @app.get("/dashboard/events", include_in_schema=False)
        async def events(request: Request) -> Response:
            """The same as server-sent events, each part whenever it has changed."""
            caller: Caller = request.state.caller
            held = contextlib.AsyncExitStack()
            held.enter_context(self._place(caller.name))
            return EventStream(self._events(self._viewer(request)), held, self._settings.stalled_s)

    def _viewer(self, request: Request) -> Viewer:
        """On this machine alone everybody is its user; without keys, elsewhere, nobody knows whose an answer is."""
        caller: Caller = request.state.caller
        return Viewer(caller.name, self._settings.local_only, self._settings.keys is not None)

    async def _events(self, viewer: Viewer) -> AsyncGenerator[dict[str, str], None]:
        last: dict[str, str] = {}
        try:
            sight = await self._lookout.sight()
            for _ in range(STREAM_LOOKS):
                for name, text in parts(sight, viewer):
                    if last.get(name) != text:
                        last[name] = text
                        yield {"event": name, "data": text}
                if self._closing.is_set():
                    return
                sight = await self._lookout.sight(sight.number)
        except BsnsError as error:
            log.warning("the dashboard cannot see the swarm", code=error.code, why=error.message)
            yield {"event": "trouble", "data": "the swarm does not answer the gateway"}

    @contextlib.contextmanager
    def _place(self, name: str) -> Iterator[None]:
        """Raises ApiError where too many watch."""
        of_a_key = MOST_OF_A_KEY if self._settings.keys is not None else MOST_STREAMS
        if self._streams.total() >= MOST_STREAMS or self._streams[name] >= of_a_key:
            raise ApiError(
                429,
                "too many dashboards are open; close one, or ask for /dashboard/state",
                type_="rate_limit_error",
                code="concurrency_limit_exceeded",
                retry_after_s=10,
            )
        self._streams[name] += 1
        try:
            yield
        finally:
            self._streams[name] -= 1
            self._streams += Counter()  # forgets those with none


def parts(sight: Sight, viewer: Viewer) -> Iterator[tuple[str, str]]:
    """What is sent of a look, part by part; what all see is written once for all."""
    yield "swarm", sight.swarm_json
    if sight.plan is not None:
        yield "plan", sight.plan.model_dump_json()
    if sight.shape is not None:
        yield "shape", sight.shape.model_dump_json()
    yield "sessions", _list(sight.sessions_of(viewer))
    yield "happened", _list(sight.events_of(viewer))


def _list(items: Iterable[BaseModel]) -> str:
    return f"[{','.join(item.model_dump_json() for item in items)}]"


def _serving(file: PageFile) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(file.content, media_type=file.media_type, headers=HEADERS)

    return serve
