"""The listening socket, and an orderly end: no new requests, then the streams that run, up to a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bsns.core.errors import BadOption, PortInUse
from bsns.gateway.settings import Settings

DRAIN_S = 30.0
HEAD_S = 30.0
"""How long the head of a request may take to come; gate.py sees to bodies."""
BACKLOG = 2048
"""uvicorn's."""
SEND_BYTES = 64 << 10
"""What waits in the kernel for a client that does not read: by itself it takes megabytes of tokens before we notice."""


class _Quiet(uvicorn.Server):
    """uvicorn, without a hand on the process's signals: the command has its own (cli.console)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Timely(H11Protocol):
    """uvicorn's HTTP/1.1, but for a head that does not come: uvicorn keeps such a connection for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Between two requests uvicorn's own, shorter timer runs until there is a byte of the next."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.timeout_keep_alive_handler)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Listener:
    """An address that is ours, and the gateway that answers there."""

    def __init__(self, host: str, port: int, settings: Settings, option: str) -> None:
        """Port 0 takes a free one; `option` is how the user gave it. Raises PortInUse, BadOption."""
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise BadOption(f"{host!r} is no address of this machine: {error.strerror}") from error
        self._socket = socket.socket(family, kind, proto)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Both hold for every connection. What a client that was given up has not read would keep it open for ever.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2e3 * settings.stalled_s))
            self._socket.bind(address)
        except OSError as error:
            self._socket.close()
            message = f"cannot listen on {host} port {port}: {error.strerror}; give another {option}"
            raise PortInUse(message) from error
        self.settings = settings
        self.host, self.port = host, int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def listen(self) -> None:
        """From now on clients can connect, and wait until `serve` answers them."""
        self._socket.listen(BACKLOG)

    async def serve(self, app: FastAPI, drain_s: float = DRAIN_S) -> None:
        """Until cancelled; then streams have `drain_s` to end."""
        config = uvicorn.Config(
            app,
            http=_Timely,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        server = _Quiet(config)
        serving = asyncio.create_task(server.serve([self._socket]))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            server.should_exit = True
            app.state.closing.set()
            await serving
            raise
