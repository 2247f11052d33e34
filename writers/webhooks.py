"""The Stripe webhook receiver: verify, hand the exact bytes to Kafka, and only then answer 2xx.

It holds no business logic and no state: what it did not get into Kafka it answers with 503, and Stripe sends it again
for three days (https://docs.stripe.com/webhooks#retries). A timeout has an unknown outcome, so the same event can be in
the topic twice; everything downstream dedupes by event id. Neither a payload nor a secret is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lakehouse.errors import UsageError
from writers.webhook_metrics import OUTCOMES, Metrics
from writers.webhook_records import BrokerUnavailable, Produce, make_record
from writers.webhook_signature import BadSignature, verify_signature

WEBHOOK_PATH = "/webhooks/stripe"
SIGNATURE_HEADER = "stripe-signature"
RETRY_AFTER_SECONDS = 5
CLOSE = {"connection": "close"}

log = logging.getLogger(__name__)


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

    def answer(outcome: str, text: str = "", headers: dict[str, str] | None = None) -> Response:
        metrics.requests[outcome].inc()
        return PlainTextResponse(text, OUTCOMES[outcome], headers=headers)

    async def receive(request: Request) -> Response:
        try:
            async with asyncio.timeout(read_timeout_seconds):  # uvicorn would wait for ever
                body = await read_body(request, max_body_bytes)
        except TimeoutError:
            return answer("read_timeout", "the body did not arrive\n", CLOSE)
        except ClientDisconnect:
            return answer("disconnected")  # nobody reads it
        if body is None:  # close, because the rest of the body is still on its way
            return answer("too_large", f"over {max_body_bytes} bytes\n", CLOSE)
        now = clock()
        try:
            # Two headers are joined by a comma, as a proxy would: two times in it make it malformed.
            signed = ",".join(request.headers.getlist(SIGNATURE_HEADER))
            verify_signature(signed, body, secrets, now, tolerance_seconds)
        except BadSignature as bad:
            metrics.bad_signatures[bad.reason].inc()
            log.info("webhook refused: bad signature (%s)", bad.reason)
            return answer("bad_signature", f"bad signature: {bad.reason}\n")
        try:
            record = make_record(body, now)
        except ValueError:
            log.error("webhook refused: %d bytes, correctly signed, are not a JSON object", len(body))  # noqa: TRY400 - the trace would show payload
            return answer("not_json_object", "not a JSON object\n")
        started = time.perf_counter()
        try:
            await produce(record)
        except BrokerUnavailable as error:
            log.warning("webhook not accepted: %s", error)
            return answer("broker_unavailable", "try again\n", {"retry-after": str(RETRY_AFTER_SECONDS)})
        metrics.produce_seconds.observe(time.perf_counter() - started)
        metrics.accepted_bytes.inc(len(body))
        metrics.last_accepted.set(now)
        return answer("accepted")

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        ready = await produce.reachable()
        return PlainTextResponse("ready\n" if ready else "broker not reachable\n", 200 if ready else 503)

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def failed(_: Request, error: Exception) -> Response:
        log.error("webhook failed: %s", type(error).__name__)
        return answer("failed", "failed\n", CLOSE)

    async def wrong_method(request: Request, error: Exception) -> Response:
        headers = dict(getattr(error, "headers", None) or {})
        if request.url.path == WEBHOOK_PATH:
            return answer("wrong_method", headers=headers)
        return Response(status_code=405, headers=headers)

    app = Starlette(
        routes=[
            Route(WEBHOOK_PATH, receive, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={405: wrong_method, 500: failed},
    )
    app.state.metrics = metrics
    return app
