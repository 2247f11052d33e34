"""An HTTP proxy in front of one local service, where requests and answers can be lost, delayed or made up.

Faults are put here and not into a client, so that what the client itself does about them (retries, timeouts, what it raises)
is part of the test.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass(frozen=True)
class Request:
    """What a client sent. Header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What goes back to it."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


Rule = Callable[[Request, Callable[[], Answer]], Answer]
"""What to do with a request: given `send`, which carries it out upstream, return an answer, or raise: then there is none."""


def pass_on(_request: Request, send: Callable[[], Answer]) -> Answer:
    """The rule without a fault."""
    return send()


class FaultProxy:
    """A proxy to `upstream` (a URL) on a free port of 127.0.0.1, from `with` to its end. `rule` may be set at any time.

    `errors` holds what rules raised that is no network failure: a defect of the test.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self.rule: Rule = pass_on
        self.errors: list[BaseException] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Pass everything on again."""
        self.rule = pass_on
        self.errors = []

    def answer(self, request: Request) -> Answer | None:
        """What the rule makes of a request; None: nothing goes back."""
        try:
            return self.rule(request, lambda: self.forward(request))
        except OSError:
            return None
        except BaseException as error:
            self.errors.append(error)
            return None

    def forward(self, request: Request) -> Answer:
        """Carry a request out upstream. The Host header stays, since S3 signs it."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in HOP_BY_HOP:
                    connection.putheader(name, value)
            if request.body or request.method in ("POST", "PUT"):
                connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body or None)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        dropped = HOP_BY_HOP - ({"content-length"} if request.method == "HEAD" else set())
        kept = tuple((n, v) for n, v in response.getheaders() if n.lower() not in dropped)
        return Answer(response.status, body, kept)

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, self.read_body())
                answer = proxy.answer(request)
                if answer is None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response_only(answer.status)
                named = {name.lower() for name, _ in answer.headers}
                for name, value in answer.headers:
                    self.send_header(name, value)
                if "content-length" not in named and answer.status != 204:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass  # trailers, which AWS's clients write into the body itself
                return body

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                """Nothing: tests have enough to say."""

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    self.close_connection = True  # the client went away, as clients with a time limit do

        return Handler
