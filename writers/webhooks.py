"""The Stripe webhook receiver: verify, hand the exact bytes to Kafka, and only then answer 2xx.

It holds no business logic and no state: what it did not get into Kafka it answers with 503, and Stripe sends it again
for three days (https://docs.stripe.com/webhooks#retries). A timeout has an unknown outcome, so the same event can be in
the topic twice; everything downstream dedupes by event id. Neither a payload nor a secret is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import uvicorn
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lakehouse.errors import Terminal, UsageError
from writers.webhook_records import BrokerUnavailable, Produce, make_record
from writers.webhook_signature import BadSignature, verify_signature

WEBHOOK_PATH = "/webhooks/stripe"
SIGNATURE_HEADER = "stripe-signature"
RETRY_AFTER_SECONDS = 5

log = logging.getLogger(__name__)


class Metrics:
    """The receiver's counters, in Prometheus' text format; touched by the event loop's thread only."""

    OUTCOMES = (
        "accepted", "bad_signature", "not_json_object", "too_large", "broker_unavailable", "wrong_method",
        "read_timeout", "disconnected",
    )  # fmt: skip
    REASONS = ("missing", "malformed", "no_v1", "mismatch", "stale", "future")

    def __init__(self) -> None:
        # All series exist from the start, so that rate() sees the first increase.
        self.requests = dict.fromkeys(self.OUTCOMES, 0)
        self.bad_signatures = dict.fromkeys(self.REASONS, 0)
        self.accepted_bytes = 0
        self.produce_seconds = 0.0
        self.last_accepted = 0.0

    def text(self) -> str:
        """The exposition (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
        lines = ["# TYPE stripe_webhook_requests_total counter"]
        lines += [f'stripe_webhook_requests_total{{outcome="{k}"}} {v}' for k, v in self.requests.items()]
        lines += ["# TYPE stripe_webhook_bad_signatures_total counter"]
        lines += [f'stripe_webhook_bad_signatures_total{{reason="{k}"}} {v}' for k, v in self.bad_signatures.items()]
        lines += ["# TYPE stripe_webhook_accepted_bytes_total counter"]
        lines += [f"stripe_webhook_accepted_bytes_total {self.accepted_bytes}"]
        lines += ["# TYPE stripe_webhook_produce_seconds summary"]
        lines += [f"stripe_webhook_produce_seconds_sum {self.produce_seconds:.6f}"]
        lines += [f"stripe_webhook_produce_seconds_count {self.requests['accepted']}"]
        lines += ["# TYPE stripe_webhook_last_accepted_timestamp_seconds gauge"]
        lines += [f"stripe_webhook_last_accepted_timestamp_seconds {self.last_accepted:.3f}"]
        return "\n".join(lines) + "\n"


async def read_body(request: Request, limit: int) -> bytes | None:
    """The whole body, or None as soon as it is known to exceed `limit` bytes (by its header, else while it streams)."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:  # the HTTP parser has refused anything but digits already
        return None
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def create_app(
    *,
    produce: Produce,
    secrets: Sequence[SecretStr],
    clock: Callable[[], float] = time.time,
    tolerance_seconds: int = 300,
    max_body_bytes: int = 1_000_000,
    read_timeout_seconds: float = 10.0,
) -> Starlette:
    """The receiver as an ASGI application; its counters are at `app.state.metrics`.

    POST /webhooks/stripe answers 200 (delivered), 400 (signature, or not a JSON object), 405, 408 (the body does not
    arrive), 413 (over `max_body_bytes`), 503 with Retry-After (no delivery report). GET /healthz: the process is up;
    /readyz: the broker is reachable; /metrics.

    Raises:
        UsageError: no secret, or a blank one (which would let anybody sign).
    """
    if not secrets or not all(secret.get_secret_value().strip() for secret in secrets):
        raise UsageError("no Stripe endpoint secret, or a blank one; set LAKEHOUSE_WEBHOOK_SECRETS='[\"whsec_...\"]'")
    metrics = Metrics()

    def answer(status: int, outcome: str, text: str = "", **headers: str) -> Response:
        metrics.requests[outcome] += 1
        return PlainTextResponse(text, status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    async def receive(request: Request) -> Response:
        try:
            async with asyncio.timeout(read_timeout_seconds):  # uvicorn would wait for ever
                body = await read_body(request, max_body_bytes)
        except TimeoutError:
            return answer(408, "read_timeout", "the body did not arrive\n", connection="close")
        except ClientDisconnect:
            return answer(400, "disconnected")  # nobody reads it
        if body is None:  # close, because the rest of the body is still on its way
            return answer(413, "too_large", f"over {max_body_bytes} bytes\n", connection="close")
        now = clock()
        try:
            # Two headers are joined by a comma, as a proxy would: two times in it make it malformed.
            signed = ",".join(request.headers.getlist(SIGNATURE_HEADER))
            verify_signature(signed, body, secrets, now, tolerance_seconds)
        except BadSignature as bad:
            metrics.bad_signatures[bad.reason] += 1
            log.info("webhook refused: bad signature (%s)", bad.reason)
            return answer(400, "bad_signature", f"bad signature: {bad.reason}\n")
        try:
            record = make_record(body, now)
        except ValueError:
            log.error("webhook refused: %d bytes, correctly signed, are not a JSON object", len(body))  # noqa: TRY400 - the trace would show payload
            return answer(400, "not_json_object", "not a JSON object\n")
        started = time.perf_counter()
        try:
            await produce(record)
        except BrokerUnavailable as error:
            log.warning("webhook not accepted: %s", error)
            return answer(503, "broker_unavailable", "try again\n", retry_after=str(RETRY_AFTER_SECONDS))
        metrics.produce_seconds += time.perf_counter() - started
        metrics.accepted_bytes += len(body)
        metrics.last_accepted = now
        return answer(200, "accepted")

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        ready = await produce.reachable()
        return PlainTextResponse("ready\n" if ready else "broker not reachable\n", 200 if ready else 503)

    async def show_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def wrong_method(request: Request, error: Exception) -> Response:
        headers = dict(getattr(error, "headers", None) or {})
        if request.url.path == WEBHOOK_PATH:
            return answer(405, "wrong_method", **headers)
        return Response(status_code=405, headers=headers)

    app = Starlette(
        routes=[
            Route(WEBHOOK_PATH, receive, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={405: wrong_method},
    )
    app.state.metrics = metrics
    return app


class ReceiverServer:
    """Serve an app from a daemon thread with uvicorn (and uvloop, httptools where installed), until the `with` ends.

    Args:
        app: from `create_app`.
        host: the address to listen on; TLS ends at the load balancer.
        port: 0 takes a free one.
        grace_seconds: how long requests under way may take at the end; longer than the delivery timeout.
    """

    def __init__(self, app: Starlette, host: str = "127.0.0.1", port: int = 0, grace_seconds: int = 15) -> None:
        self._app, self._host, self._port, self._grace = app, host, port, grace_seconds
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
            http="auto",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=1_000,  # connections; bounds the memory that unsigned bodies can take
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
