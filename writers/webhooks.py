"""The Stripe webhook receiver: verify, hand the exact bytes to Kafka, and only then answer 2xx.

It holds no business logic and no state: what it did not get into Kafka it answers with 503, and Stripe sends it again
for three days (https://docs.stripe.com/webhooks#retries). A timeout has an unknown outcome, so the same event can be in
the topic twice; everything downstream dedupes by event id. Neither a payload nor a secret is ever logged.

Three parts: what a request must be (`verify_signature`, `make_record`), the answers (`create_app`), and the two
ends of it (`KafkaProduce`, `ReceiverServer`).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import msgspec
import uvicorn
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from lakehouse.errors import Retryable, Terminal, UsageError

WEBHOOK_PATH = "/webhooks/stripe"
SIGNATURE_HEADER = "stripe-signature"
RETRY_AFTER_SECONDS = 5
MAX_KEY_CHARS = 512  # Stripe ids have at most 255; a key must not push a legal body over the broker's record limit
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMESTAMP = re.compile(r"[0-9]{1,12}", re.ASCII)  # int() would also take " 1", "1_0", other scripts' digits, 5000 digits

# After these an idempotent producer never delivers again, though librdkafka calls only some of them fatal: seen are
# UNKNOWN_PRODUCER_ID (a broker that lost its state) and PRODUCER_FENCED (a broker that hung until our timeout).
PRODUCER_IS_DONE = {
    KafkaError._FATAL,
    KafkaError.UNKNOWN_PRODUCER_ID,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
    KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
}

log = logging.getLogger(__name__)


class BadSignature(Exception):
    """Why a request is not from Stripe; `reason` is one word, safe to log and to count by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BrokerUnavailable(Retryable):
    """The record has no delivery report: the broker is away, refused it or took too long."""


class Record(NamedTuple):
    """One Kafka record of the Stripe topic."""

    key: bytes
    value: bytes
    timestamp_ms: int
    headers: list[tuple[str, bytes]]


class Produce(Protocol):
    """Where verified webhooks go."""

    async def __call__(self, record: Record) -> None:
        """Return once the record is durable; else raise `BrokerUnavailable`."""

    async def reachable(self) -> bool:
        """Whether a record would have a chance now."""


def verify_signature(header: str, body: bytes, secrets: Sequence[SecretStr], now: float, tolerance: int | float = 300) -> None:
    """Check Stripe's `Stripe-Signature` header over the raw body (https://docs.stripe.com/webhooks#verify-manually).

    Any of the secrets (two are active while one is rolled) may have made any of the `v1` signatures; other schemes are
    ignored, so nobody can downgrade. All pairs are compared, each in constant time. Why not the `stripe` library: it
    takes one secret, reads the wall clock, accepts any future timestamp and decodes the body first.

    Args:
        header: as HTTP gave it, `t=<unix seconds>,v1=<hex>[,v1=<hex>...]`.
        body: the request's body, not one byte changed.
        secrets: the active endpoint secrets; blank ones are ignored (anybody can sign with those).
        now: unix seconds.
        tolerance: seconds that the header's time may differ from `now`, either way.

    Raises:
        BadSignature: missing | malformed | no_v1 | mismatch | stale | future.
    """
    if not header:
        raise BadSignature("missing")
    items = [item.strip().partition("=") for item in header.split(",")]
    times = [value for name, _, value in items if name == "t"]
    if len(times) != 1 or not TIMESTAMP.fullmatch(times[0]):
        raise BadSignature("malformed")
    # As bytes, because compare_digest refuses text that is not ASCII.
    signatures = [value.encode("utf-8", "surrogatepass") for name, _, value in items if name == "v1"]
    if not signatures:
        raise BadSignature("no_v1")
    matches = False
    for secret in secrets:
        if not (key := secret.get_secret_value().encode()).strip():
            continue
        expected = hmac.new(key, times[0].encode() + b"." + body, hashlib.sha256).hexdigest().encode()
        for signature in signatures:
            matches |= hmac.compare_digest(expected, signature)
    if not matches:
        raise BadSignature("mismatch")
    age = now - int(times[0])  # only after the signature: a stale one tells of a replay or of a wrong clock
    if abs(age) > tolerance:
        raise BadSignature("stale" if age > 0 else "future")


NULL = msgspec.Raw(b"null")


class _Envelope(msgspec.Struct):
    id: msgspec.Raw = NULL
    account: msgspec.Raw = NULL
    data: msgspec.Raw = NULL


class _Data(msgspec.Struct):
    object: msgspec.Raw = NULL


class _Object(msgspec.Struct):
    id: msgspec.Raw = NULL


_envelope = msgspec.json.Decoder(_Envelope)
_data = msgspec.json.Decoder(_Data)
_object = msgspec.json.Decoder(_Object)
_text = msgspec.json.Decoder(str)


def record_key(body: bytes) -> bytes:
    """The Kafka key: `account:object`, so that one object's events stay in order in one partition.

    Only the body being a JSON object is required. A field that is absent or of another type (an upcoming invoice has no
    id, a v2 thin event no `data.object`) falls back to the event id: judging events is not the receiver's business.

    Raises:
        ValueError: the body is not a JSON object, or is nested too deeply for any parser downstream.
    """
    try:
        envelope = _envelope.decode(body)
        try:
            object_id = _text_or_none(_object.decode(_data.decode(envelope.data).object).id)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            object_id = None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError("not a JSON object") from error
    account = _text_or_none(envelope.account) or "platform"
    key = f"{account}:{object_id or _text_or_none(envelope.id) or 'unknown'}"
    return key[:MAX_KEY_CHARS].encode()


def _text_or_none(raw: msgspec.Raw) -> str | None:
    try:
        return _text.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def make_record(body: bytes, received_at: float) -> Record:
    """The record of one verified webhook.

    Headers: `received_at` (ISO 8601, UTC, microseconds, `...Z`) and `source`. The Kafka timestamp is the same instant,
    cut to milliseconds.
    """
    micros = round(received_at * 1_000_000)
    iso = (EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    headers = [("received_at", iso.encode()), ("source", b"webhook")]
    return Record(record_key(body), body, micros // 1000, headers)


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


class KafkaProduce:
    """Produce to one topic and wait for the broker's own delivery report; create the topic first (`ensure_topics`).

    Args:
        bootstrap_servers: `host:port[,...]`.
        topic: `settings.stripe_topic`.
        delivery_timeout_seconds: a record without a report by then is given up (outcome unknown).
        config: librdkafka settings on top, e.g. TLS and SASL for MSK.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        *,
        delivery_timeout_seconds: float = 10.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._topic = topic
        self._timeout = delivery_timeout_seconds
        self._config: dict[str, Any] = {
            "bootstrap.servers": bootstrap_servers,
            "client.id": "stripe-webhooks",
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": 1,
            "compression.type": "zstd",
            "delivery.timeout.ms": int(delivery_timeout_seconds * 1000),
            "message.max.bytes": 1_048_588,  # Kafka's default; librdkafka's own (1 000 000) counts key and headers too
            # While the broker is away requests wait here; over this they are refused at once (503).
            "queue.buffering.max.messages": 10_000,
            "queue.buffering.max.kbytes": 65_536,
            "reconnect.backoff.max.ms": 1_000,  # default 10 s: back soon after the broker is
            "log_level": 0,
            **(config or {}),
            "error_cb": lambda _: None,  # without one the client writes connection errors to stderr
        }
        self._broken = threading.Event()
        self._closing = threading.Event()
        self._probing: asyncio.Future[bool] | None = None
        self._producer = Producer(self._config)
        self._thread = threading.Thread(target=self._poll_for_ever, name="stripe-webhooks-delivery", daemon=True)
        self._thread.start()

    def __enter__(self) -> KafkaProduce:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __call__(self, record: Record) -> None:
        """Produce one record and await its delivery report.

        Raises:
            BrokerUnavailable: naming librdkafka's error code.
        """
        if self._closing.is_set():
            raise BrokerUnavailable("the receiver is stopping")
        loop = asyncio.get_running_loop()
        producer = self._producer
        delivered: asyncio.Future[KafkaError | None] = loop.create_future()

        def resolve(error: KafkaError | None) -> None:
            if not delivered.done():
                delivered.set_result(error)

        def report(error: KafkaError | None, _: Message) -> None:  # in the poll thread
            try:
                loop.call_soon_threadsafe(resolve, error)
            except RuntimeError:  # the loop was closed: nobody waits any more
                log.warning("a delivery report came after the server stopped")

        try:
            producer.produce(
                self._topic,
                value=record.value,
                key=record.key,
                timestamp=record.timestamp_ms,
                headers=list(record.headers),
                on_delivery=report,
            )
        except BufferError:
            raise BrokerUnavailable("the producer's queue is full: the broker is away or too slow") from None
        except KafkaException as error:
            self._note(error.args[0], producer)
            raise BrokerUnavailable(f"produce: {error.args[0].name()}") from None
        try:
            # The extra second is for reports that a fatal error swallowed (see _poll_for_ever).
            async with asyncio.timeout(self._timeout + 1):
                failure = await delivered
        except TimeoutError:
            raise BrokerUnavailable("no delivery report") from None
        if failure is not None:
            self._note(failure, producer)
            raise BrokerUnavailable(f"delivery: {failure.name()}")

    async def reachable(self) -> bool:
        """Whether a broker answers within 2 s and has the topic; concurrent callers share one question."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.ensure_future(asyncio.to_thread(self._has_topic))
        return await asyncio.shield(self._probing)

    def close(self) -> None:
        """Wait (at most the delivery timeout) for what is on its way, then stop."""
        if self._closing.is_set():
            return
        _flush(self._producer, self._timeout)
        self._closing.set()
        self._thread.join()

    def _has_topic(self) -> bool:
        try:
            # All topics: asking for this one by name would create it, with a partition count of nobody's choice.
            topic = self._producer.list_topics(timeout=2.0).topics.get(self._topic)
        except KafkaException:
            return False
        return topic is not None and topic.error is None

    def _note(self, error: KafkaError, producer: Producer) -> None:
        # A late report of a producer that was replaced must not condemn the new one.
        if producer is self._producer and (error.fatal() or error.code() in PRODUCER_IS_DONE):
            self._broken.set()

    def _poll_for_ever(self) -> None:
        while not self._closing.is_set():
            try:
                self._producer.poll(0.1)
            except Exception as error:  # nothing may end this thread: all answers come through it
                # A fatal error is raised out of poll() (as KafkaException, or SystemError when a report was running).
                log.error("delivery thread: %s", type(error).__name__)  # noqa: TRY400
                self._broken.set()
            if self._broken.is_set():
                # The new one may repeat what the old one delivered without a report; downstream dedupes.
                log.error("the producer cannot go on; a new one takes over")
                old, self._producer = self._producer, Producer(self._config)
                self._broken.clear()
                old.purge()
                _flush(old, 1.0)  # the failed reports, so that their requests are answered at once


def _flush(producer: Producer, seconds: float) -> None:
    try:
        producer.flush(seconds)
    except Exception as error:  # as for poll(): a fatal error comes out of it
        log.error("flushing the producer: %s", type(error).__name__)  # noqa: TRY400


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
