"""Kafka -> raw: records exactly as received, committed together with the offsets they end at.

The positions in the table are the only truth about progress; Kafka's group offsets are not used. A batch is bounded by
rows and bytes; each is one append at position, so a second writer on the same partitions is refused and drops its buffer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from lakehouse.append import append_rows
from lakehouse.errors import Retryable, Terminal
from lakehouse.lake import Lake
from lakehouse.positions import read_positions

TIMEOUT_SECONDS = 10.0
STALLED_SECONDS = 30.0

RAW_SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("kafka_timestamp", pa.timestamp("ms", "UTC")),
        ("key", pa.binary()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
        ("payload", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Batch:
    """One committed micro-batch: its snapshot (None: nothing was new), rows and payload bytes."""

    table: str
    snapshot_id: int | None
    rows: int
    payload_bytes: int


def coordinate(value: int | None) -> int:
    """A partition or offset, which every consumed record has (the client's types leave it open)."""
    assert value is not None
    return value


def records_to_arrow(messages: Sequence[Message]) -> pa.Table:
    """Kafka records as columns RAW_SCHEMA: bytes untouched, tombstones as NULL, a missing timestamp as NULL."""
    headers = [m.headers() or () for m in messages]
    ends = list(itertools.accumulate((len(h) for h in headers), initial=0))
    pairs = list(itertools.chain.from_iterable(headers))
    header_type = RAW_SCHEMA.field("headers").type
    flat = pa.StructArray.from_arrays(
        [pa.array([k for k, _ in pairs], pa.string()), pa.array([v for _, v in pairs], pa.binary())],
        fields=list(header_type.value_type),
    )
    return pa.table(
        [
            pa.array([m.topic() for m in messages], pa.string()),
            pa.array([m.partition() for m in messages], pa.int32()),
            pa.array([m.offset() for m in messages], pa.int64()),
            pa.array([None if (t := m.timestamp())[0] == 0 else t[1] for m in messages], pa.timestamp("ms", "UTC")),
            pa.array([m.key() for m in messages], pa.binary()),
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat, type=header_type),
            pa.array([m.value() for m in messages], pa.binary()),
        ],
        schema=RAW_SCHEMA,
    )


def received_by_kafka(rows: pa.Table) -> pa.Table:
    """product.events: the record's own timestamp is when the edge received it; one without any was received by now."""
    now = pa.scalar(datetime.now(UTC), rows.schema.field("kafka_timestamp").type)
    return rows.append_column("received_at", pc.fill_null(rows.column("kafka_timestamp"), now))


def topic_source(bootstrap: str, topic: str) -> tuple[str, list[int]]:
    """(`cluster id/topic id`, partitions) of a topic, to notice a topic that was created again.

    Raises:
        Retryable: no broker answers. Terminal: there is no such topic.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})  # what goes wrong is raised, not logged
    try:
        metadata = admin.list_topics(timeout=TIMEOUT_SECONDS)
        found = admin.describe_topics(TopicCollection([topic]), request_timeout=TIMEOUT_SECONDS)[topic].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise Terminal(
                f"Kafka at {bootstrap} has no topic {topic!r}; create it, or set LAKEHOUSE_PRODUCT_TOPIC / _STRIPE_TOPIC"
            ) from None
        raise Retryable(f"no Kafka broker answers at {bootstrap}: {error.args[0].str()}") from None
    return f"{metadata.cluster_id}/{found.topic_id}", [p.id for p in found.partitions]


def ingest(
    lake: Lake,
    table_name: str,
    topic: str,
    bootstrap: str,
    enrich: Callable[[pa.Table], pa.Table],
    on_batch: Callable[[Batch], None] | None = None,
) -> list[Batch]:
    """Commit everything the topic holds at the time of the call, in micro-batches, from the table's positions on.

    enrich: adds the table's further columns to RAW_SCHEMA columns.

    Raises:
        Fenced: another writer works on these partitions; the buffer is dropped.
        Terminal: a position that Kafka no longer has, or a topic that was created again: never skipped over.
        Retryable: the broker went away.
    """
    source, partitions = topic_source(bootstrap, topic)
    known = read_positions(lake.open_for_write(table_name).metadata).get(table_name, {})
    for (t, p), position in known.items():
        if t == topic and position.source and position.source != source:
            raise Terminal(
                f"{table_name}: topic {topic!r} is not the one its positions came from ({position.source} then, {source} now, "
                f"partition {p} at offset {position.next_offset}): it was created again, or this is another cluster. "
                "Its offsets mean other records now: consume it under a new topic name"
            )
    positions = {p: known[topic, p].next_offset if (topic, p) in known else 0 for p in partitions}
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "log_level": 0,  # what goes wrong is raised, not logged
            "group.id": f"lakehouse.{table_name}",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
            # the end of a partition is where a fetch finds nothing more: the embedded broker's watermarks are too low
            "enable.partition.eof": True,
            # librdkafka's default of 1000 ms stalls after every full queue
            "fetch.queue.backoff.ms": 5,
            # how long the broker holds a fetch at the end of a partition, which this job waits for
            "fetch.wait.max.ms": 20,
            "queued.max.messages.kbytes": 65_536,
        }
    )
    try:
        # a partition that the table has never read begins with the first record Kafka still has
        consumer.assign([TopicPartition(topic, p, positions[p] if (topic, p) in known else OFFSET_BEGINNING) for p in partitions])
        ahead = set(partitions)
        batches = []
        while ahead:
            messages, size = _read(consumer, topic, ahead, lake.settings.batch_rows, lake.settings.batch_bytes)
            if not messages:
                continue
            snapshot_id = _commit_batch(lake, table_name, topic, positions, messages, source, enrich)
            batches.append(Batch(table_name, snapshot_id, len(messages), size))
            if on_batch:
                on_batch(batches[-1])
        return batches
    finally:
        consumer.close()


def _commit_batch(
    lake: Lake,
    table_name: str,
    topic: str,
    positions: dict[int, int],
    messages: Sequence[Message],
    source: str,
    enrich: Callable[[pa.Table], pa.Table],
) -> int | None:
    """Stage, check and commit one batch; `positions` is advanced in place once it has landed."""
    reached: dict[int, int] = {}
    for message in messages:
        reached[coordinate(message.partition())] = coordinate(message.offset()) + 1
    done = append_rows(
        lake,
        table_name,
        enrich(records_to_arrow(messages)),
        expected={(topic, p): positions[p] for p in reached},
        reached={(topic, p): offset for p, offset in reached.items()},
        sources={topic: source},
    )
    positions.update(reached)
    return done.snapshot_id


def _read(consumer: Consumer, topic: str, ahead: set[int], rows: int, size_limit: int) -> tuple[list[Message], int]:
    """Consume up to `rows` records or `size_limit` bytes; partitions whose end is reached are taken out of `ahead`."""
    messages: list[Message] = []
    size = 0
    heard = time.monotonic()
    while ahead and len(messages) < rows and size < size_limit:
        # returns early only when it has all it was asked for, so the wait is short: it is paid at every end
        found = consumer.consume(min(10_000, rows - len(messages)), timeout=0.05)
        if found:
            heard = time.monotonic()
        elif time.monotonic() - heard > STALLED_SECONDS:
            raise Retryable(f"nothing heard of {topic} for {STALLED_SECONDS:.0f} s; is the broker up?")
        for message in found:
            if error := message.error():
                if error.code() == KafkaError._PARTITION_EOF:
                    ahead.discard(coordinate(message.partition()))
                    continue
                if error.code() == KafkaError._AUTO_OFFSET_RESET:
                    raise Terminal(
                        f"{topic}[{message.partition()}]: Kafka no longer has the offset that the table stands at "
                        f"({error.str()}). Nothing was skipped: records were lost before they were read, or it was created again"
                    )
                raise Retryable(f"reading {topic}: {error.str()}")
            messages.append(message)
            size += len(message.value() or b"")
    return messages, size
