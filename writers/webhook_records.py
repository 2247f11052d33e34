"""From an accepted webhook to a record that Kafka has acknowledged."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from lakehouse.errors import Retryable

MAX_KEY_CHARS = 512  # Stripe ids have at most 255; a key must not push a legal body over the broker's record limit
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

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
        body.decode()  # msgspec passes over what is not UTF-8 in the parts that it keeps raw
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


def make_record(body: bytes, received_at: float, source: str = "webhook") -> Record:
    """The record of one verified webhook, or of what a reconciliation fetched (source `events_api` or `api_snapshot`).

    Headers: `received_at` (ISO 8601, UTC, microseconds, `...Z`) and `source`. The Kafka timestamp is the same instant,
    cut to milliseconds.
    """
    micros = round(received_at * 1_000_000)
    iso = (EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    headers = [("received_at", iso.encode()), ("source", source.encode())]
    return Record(record_key(body), body, micros // 1000, headers)


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
