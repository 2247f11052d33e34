"""An HTTP proxy before a service that loses requests and answers, refuses, delays and cuts, as a network and a busy service do.

What a client must survive differs by what was asked: a *commit* (the one request that swaps the table's metadata) may be lost
before or after it landed, be refused though it landed (as a client that sends twice is), or land after its client gave up;
anything else fails, hangs or breaks off.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

COMMIT_FAULTS = ("lost_before", "lost_after", "landed_then_refused", "lands_late", "refused", "unavailable")
STORE_FAULTS = ("error", "reset", "slow", "cut", "lost_after_write")
LATE_SECONDS = 0.4
SLOW_SECONDS = (0.1, 1.0)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}

Request = tuple[str, str, Mapping[str, str]]
"""Method, path, headers."""


def rest_commit(request: Request) -> bool:
    """Whether a request to an Iceberg REST catalog commits to a table."""
    method, path, _ = request
    return method == "POST" and "/tables/" in path


def glue_commit(request: Request) -> bool:
    """Whether a request to Glue commits to a table."""
    return request[2].get("X-Amz-Target") == "AWSGlue.UpdateTable"


def never(_: Request) -> bool:
    """An object store commits nothing."""
    return False


# What a refusal of a commit looks like: a clean "another was first", in the words of each catalog.
REST_REFUSAL = (409, {"error": {"message": "stale", "type": "CommitFailedException", "code": 409}})
GLUE_REFUSAL = (400, {"__type": "ConcurrentModificationException", "Message": "stale"})


class FaultyProxy:
    """A proxy on a free loopback port, from `with` on. `set_odds` makes it faulty, `set_odds({})` faithful again.

    Args:
        upstream: URL of the service. is_commit: which requests commit. refusal: how the service refuses one.
    """

    def __init__(
        self, upstream: str, is_commit: Callable[[Request], bool] = never, refusal: tuple[int, object] = REST_REFUSAL
    ) -> None:
        self.upstream, self.is_commit, self.refusal = urlparse(upstream), is_commit, refusal
        self.counts: Counter[str] = Counter()
        self._odds: Mapping[str, float] = {}
        self._dice = random.Random(0)
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self._server = _Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def set_odds(self, odds: Mapping[str, float], seed: object = 0) -> None:
        """The probability of each fault, for the requests that it concerns."""
        with self._lock:
            self._odds, self._dice = odds, random.Random(str(seed))

    def draw(self, commit: bool, write: bool) -> str:
        """The fault that befalls a request, counted; empty for most."""
        with self._lock:
            lot = self._dice.random()
            for name in COMMIT_FAULTS if commit else STORE_FAULTS:
                lot -= self._odds.get(name, 0.0)
                if lot < 0 and (write or name != "lost_after_write"):
                    self.counts[name] += 1
                    return name
            return ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    _connection: http.client.HTTPConnection | None = None

    def do_GET(self) -> None:
        body = self._body()
        request = (self.command, self.path, self.headers)
        commit, write = self.proxy.is_commit(request), self.command in ("PUT", "POST", "DELETE")
        fault = self.proxy.draw(commit, write)
        if fault in ("lost_before", "reset"):
            self._hang_up()
        elif fault in ("unavailable", "error"):
            self._answer(
                503, [("Content-Type", "application/xml")], b"<Error><Code>SlowDown</Code><Message>busy</Message></Error>"
            )
        elif fault == "refused":
            self._refuse()
        elif fault == "lands_late":
            self._hang_up()
            time.sleep(LATE_SECONDS)
            self._forward(body)
        else:
            if fault == "slow":
                time.sleep(self.proxy._dice.uniform(*SLOW_SECONDS))
            status, headers, answer = self._forward(body)
            if fault in ("lost_after", "lost_after_write"):
                self._hang_up()
            elif fault == "landed_then_refused" and status < 300:
                self._refuse()
            else:
                self._answer(status, headers, answer, cut=fault == "cut")

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Pass the request on as it came, the Host header included, which the signature covers."""
        once = self.proxy.is_commit((self.command, self.path, self.headers))
        for attempt in (1,) if once else (0, 1):  # the service may have closed the connection since the last request
            if self._connection is None or once:
                self._connection = http.client.HTTPConnection(
                    self.proxy.upstream.hostname or "", self.proxy.upstream.port, timeout=60
                )
            try:
                self._connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in HOP_BY_HOP and name.lower() != "expect":
                        self._connection.putheader(name, value)
                self._connection.putheader("Content-Length", str(len(body)))
                self._connection.endheaders(body or None)
            except OSError:
                self._connection = None
                if attempt:
                    raise
                continue
            try:
                answer = self._connection.getresponse()
                read = answer.read()
            except http.client.RemoteDisconnected:
                self._connection = None
                if attempt:
                    raise
                continue
            return answer.status, answer.getheaders(), read
        raise AssertionError

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of a HEAD, whose body is absent
            elif name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self._hang_up()

    def _refuse(self) -> None:
        status, body = self.proxy.refusal
        self._answer(status, [("Content-Type", "application/json")], json.dumps(body).encode())

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""
