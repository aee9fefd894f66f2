"""The address at which Prometheus reads a node's metrics, served by threads of its own.

The event loop is asked for its figures at most once a second, whoever reads how often. Whoever is slow holds one of a
few places, for a few seconds; others that come beside wait in the kernel or are hung up on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric

from bsns.core.errors import BadOption, PortInUse
from bsns.core.hosts import is_loopback, names_this_machine

FRESH_S = 1.0
PLACES = 8
"""Requests at once."""
REQUEST_S = 5.0
"""What a request may take, from its first byte to the reply's last."""
PAUSE_S = 0.01
"""Between two requests: whoever asks without end shall not take the processor from the node."""
LOOP_S = 2.0
"""How long the event loop may take to say its figures."""
PAGE = "/metrics"
_PLACE = re.compile(r"(?:(?P<host>\[[0-9a-fA-F:.%]+\]|[^:\[\]]+):)?(?P<port>\d{1,5})")


def parse_place(text: str) -> tuple[str, int]:
    """`HOST:PORT`, or a port of this machine's own. Raises BadOption."""
    match = _PLACE.fullmatch(text.strip())
    if match is None or int(match["port"]) > 65535:
        raise BadOption(f"{text!r} is no HOST:PORT; write for example 127.0.0.1:9464")
    return (match["host"] or "127.0.0.1").strip("[]"), int(match["port"])


class Scraping:
    """A listening socket that is ours; it answers from `begin` to `close`."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises PortInUse, BadOption."""
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise BadOption(f"{host!r} is no address of this machine: {error.strerror}") from error
        try:
            self._server = _Server(family, address)
        except OSError as error:
            raise PortInUse(f"cannot listen on {host} port {port}: {error.strerror}; give another --metrics") from error
        self._local_only = is_loopback(host)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}{PAGE}"
        self._thread: threading.Thread | None = None

    def begin(self, read: Callable[[], Sequence[Metric]]) -> None:
        """Answer from now on with what `read` says when it is called on this event loop."""
        self._server.set_app(_Page(_Figures(read), local_only=self._local_only))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()


class _Figures:
    """A collector whose figures another thread's event loop has."""

    def __init__(self, read: Callable[[], Sequence[Metric]]) -> None:
        self._read = read
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Sequence[Metric]:
        """Raises TimeoutError where the loop is too busy, or has ended."""
        told: concurrent.futures.Future[Sequence[Metric]] = concurrent.futures.Future()

        def tell() -> None:
            if not told.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                told.set_result(self._read())
            except Exception as error:  # noqa: BLE001  whoever asks is told
                told.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(tell)
        except RuntimeError:
            raise TimeoutError("the event loop has ended") from None
        try:
            return told.result(LOOP_S)
        finally:
            told.cancel()


class _Registered:
    """What was collected last: `generate_latest` wants a collector."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


class _Page:
    """A WSGI application of one page."""

    def __init__(self, figures: _Figures, *, local_only: bool) -> None:
        self._figures = figures
        self._local_only = local_only
        self._process = ProcessCollector(registry=CollectorRegistry())
        self._lock = threading.Lock()
        self._text, self._read_s = b"", float("-inf")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, body = self._reply(environ)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    def _reply(self, environ: dict[str, Any]) -> tuple[str, bytes]:
        if self._local_only and not names_this_machine(environ.get("HTTP_HOST", "")):
            return "403 Forbidden", b"this machine only, by the name localhost or 127.0.0.1\n"
        if environ["PATH_INFO"] != PAGE:
            return "404 Not Found", f"there is nothing here but {PAGE}\n".encode()
        if environ["REQUEST_METHOD"] != "GET":
            return "405 Method Not Allowed", b"GET is all there is\n"
        try:
            return "200 OK", self._latest()
        except TimeoutError:
            return "503 Service Unavailable", b"the node is too busy to say\n"

    def _latest(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._read_s >= FRESH_S:
                metrics = [*self._figures.collect(), *self._process.collect()]
                self._text = generate_latest(_Registered(metrics))
                self._read_s = time.monotonic()
            return self._text


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """Who reads metrics, and what strangers send instead, is nothing to tell."""

    def address_string(self) -> str:
        return str(self.client_address[0])


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = socket.AddressFamily(family)
        self._places = threading.BoundedSemaphore(PLACES)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As the library does, but without asking a name server for the address's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = map(self.server_address.__getitem__, (0, 1))  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        time.sleep(PAUSE_S)
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        hang_up = threading.Timer(REQUEST_S, _hang_up, (request,))
        hang_up.daemon = True
        try:
            hang_up.start()
            super().process_request_thread(request, client_address)
        finally:
            hang_up.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went, or was hung up on, is nothing to tell."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is over already
        request.shutdown(socket.SHUT_RDWR)
