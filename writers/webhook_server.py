"""The HTTP server under the receiver: uvicorn in a thread, with the limits on connections that it lacks.

uvicorn waits for ever for the first byte of a request and for the end of its head, and takes a head of any size: some hundred
idle or slow connections would use up the limit on connections and keep Stripe out.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lakehouse.errors import Terminal, UsageError
from writers.webhook_metrics import REFUSALS, Metrics

HEAD_SECONDS = 10.0
HEAD_BYTES = 32_768  # Stripe sends under 1 KB
MAX_CONNECTIONS = 1_000


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; refuses a head that is too slow (408) or too large (431), and counts what it refuses."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._metrics: Metrics = self.config.app.state.metrics  # type: ignore[union-attr]
        self._head_seconds: float = self.config.app.state.head_seconds  # type: ignore[union-attr]
        self._deadline: asyncio.TimerHandle | None = None
        self._head = 0  # bytes of a head that is not complete yet
        self._in_head = True
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: the head of its first request has to come in time."""
        super().connection_made(transport)
        self._metrics.connections.inc()
        self._deadline = self.loop.call_later(self._head_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._metrics.connections.dec()
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes: of a head that does not end there can be too many."""
        if self._refused:
            return
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse("head_too_large")

    def on_message_begin(self) -> None:
        """The first byte of a request: its head has to come in time."""
        super().on_message_begin()
        self._head, self._in_head = 0, True
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._head_seconds, self._too_slow)

    def on_headers_complete(self) -> None:
        """The head is there: it has to be of a reasonable size, and there has to be room for the request."""
        self._in_head = False
        self._arrived()
        if self._head_size() > HEAD_BYTES:
            raise _HeadTooLargeError
        if len(self.connections) >= MAX_CONNECTIONS or len(self.tasks) >= MAX_CONNECTIONS:
            self._metrics.refusals["over_capacity"].inc()  # uvicorn answers it
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser, or a callback of it, gave up (`msg` is uvicorn's word for it)."""
        del msg
        self._refuse("head_too_large" if self.headers is not None and self._head_size() > HEAD_BYTES else "malformed")

    def _head_size(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_complete:  # an earlier request is being answered
            self._deadline = self.loop.call_later(self._head_seconds, self._too_slow)
        elif not self.transport.is_closing():
            self._refuse("head_too_slow")

    def _refuse(self, reason: str) -> None:
        """Answer and close; requests before the one at fault are answered first, or a 400 would be taken for their answer."""
        self._metrics.refusals[reason].inc()
        self._refused = True
        self._arrived()
        if self.pipeline and self.cycle.more_body:  # the one at fault waits behind others
            self.pipeline.popleft()
            return
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False
            return
        status, text = REFUSALS[reason], reason.replace("_", " ").encode() + b"\n"
        head = b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(text)
        self.transport.write(STATUS_LINE[status] + head + text)
        self.transport.close()


class _HeadTooLargeError(Exception):
    """Ends the parser's callback."""


class ReceiverServer:
    """Serve an app from a daemon thread with uvicorn, until the `with` ends.

    Args:
        app: from `create_app`.
        host: the address to listen on; TLS ends at the load balancer.
        port: 0 takes a free one.
        grace_seconds: how long requests under way may take at the end; longer than the delivery timeout.
        head_seconds: how long a connection may take to send the head of a request.
    """

    def __init__(
        self,
        app: Starlette,
        host: str = "127.0.0.1",
        port: int = 0,
        grace_seconds: int = 15,
        head_seconds: float = HEAD_SECONDS,
    ) -> None:
        self._app, self._host, self._port, self._grace = app, host, port, grace_seconds
        app.state.head_seconds = head_seconds
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """`http://host:port`, without a slash at the end."""
        return f"http://{self._host}:{self._port}"

    def __enter__(self) -> ReceiverServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> ReceiverServer:
        """Listen and serve; returns once requests are answered.

        Raises:
            UsageError: the address cannot be listened on.
            Terminal: the server ended while starting.
        """
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
        except OSError as error:
            listener.close()
            raise UsageError(
                f"cannot listen on {self._host}:{self._port} ({error.strerror}); "
                "stop what listens there or set LAKEHOUSE_WEBHOOK_PORT (0 takes a free port)"
            ) from error
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            loop="auto",
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="error",  # a warning for each malformed request would be a way to fill the disk; they are counted
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,  # bounds the memory that unsigned bodies can take
            timeout_graceful_shutdown=self._grace,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="stripe-webhooks", daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                listener.close()
                raise Terminal(f"the webhook receiver ended while starting on {self._host}:{self._port}; see the log")
            time.sleep(0.005)
        self._server, self._thread = server, thread
        return self

    def stop(self) -> None:
        """Take no new request, let those under way finish, then end. Safe to call twice."""
        server, self._server = self._server, None
        thread, self._thread = self._thread, None
        if server is None or thread is None:
            return
        server.should_exit = True
        thread.join(self._grace + 5)
