"""Kafka records -> Arrow columns, byte for byte: loops in C, since this runs for each of 350,000 records a second."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message

log = logging.getLogger(__name__)

# Milliseconds since the epoch of the years 1 to 9999: outside of them neither Python nor Snowflake has a date.
EARLIEST_MS, LATEST_MS = -62_135_596_800_000, 253_402_300_799_999

_HEADER = pa.struct([pa.field("key", pa.large_string(), nullable=False), pa.field("value", pa.large_binary())])

_UNREADABLE = "unreadable"

# the types in which pyiceberg reads and writes the raw tables, so that nothing is converted on the way
RAW_SCHEMA = pa.schema(
    [
        ("topic", pa.large_string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("kafka_timestamp", pa.timestamp("us", "UTC")),
        ("key", pa.large_binary()),
        ("headers", pa.large_list(pa.field("element", _HEADER, nullable=False))),
        ("payload", pa.large_binary()),
    ]
)


def records_to_arrow(messages: Sequence[Any]) -> pa.Table:
    """Records (confluent_kafka.Message) of one topic as RAW_SCHEMA: bytes untouched, NULL for a tombstone.

    The timestamp is NULL if the record has none, or one that is no date of the years 1 to 9999. The headers are NULL if the
    client cannot hand them over, because a name in them is not UTF-8. Neither may hold up the records that follow.
    """
    return pa.table(
        [
            pa.repeat(pa.scalar(messages[0].topic() if messages else "", RAW_SCHEMA.field("topic").type), len(messages)),
            _column("partition", map(Message.partition, messages)),
            _column("offset", map(Message.offset, messages)),
            _timestamps(messages),
            _column("key", map(Message.key, messages)),
            _headers(_read_headers(messages)),
            _column("payload", map(Message.value, messages)),
        ],
        schema=RAW_SCHEMA,
    )


def received_by_kafka(rows: pa.Table) -> pa.Table:
    """product.events: the record's own timestamp is when the edge received it; one without any was received by now."""
    at = rows.column("kafka_timestamp")
    return rows.append_column("received_at", pc.fill_null(at, pa.scalar(datetime.now(UTC), at.type)) if at.null_count else at)


def _column(name: str, values: Iterable[Any]) -> pa.Array:
    return pa.array(list(values), RAW_SCHEMA.field(name).type)


def _timestamps(messages: Sequence[Any]) -> pa.Array:
    """Milliseconds since the epoch; NULL where the record has none (message format 0), or a producer's nonsense."""
    pairs = list(map(Message.timestamp, messages))
    said = [at for _, at in pairs]
    values: list[int] | list[int | None] = said
    if TIMESTAMP_NOT_AVAILABLE in {kind for kind, _ in pairs} or (said and (min(said) < EARLIEST_MS or max(said) > LATEST_MS)):
        values = [at if kind != TIMESTAMP_NOT_AVAILABLE and EARLIEST_MS <= at <= LATEST_MS else None for kind, at in pairs]
    return pa.array(values, pa.int64()).cast(pa.timestamp("ms", "UTC")).cast(RAW_SCHEMA.field("kafka_timestamp").type)


def _read_headers(messages: Sequence[Any]) -> list[Any]:
    """What the client says of each record's headers, `_UNREADABLE` where it raises.

    confluent-kafka 2.16 decodes the names and stumbles over what is not UTF-8. Each record is asked once: asked again it would
    answer with a list that it has half filled, and whoever looks into that crashes the interpreter.
    """
    found: list[Any] = []
    left = iter(messages)
    while len(found) < len(messages):
        try:
            found.extend(map(Message.headers, left))
        except (SystemError, UnicodeDecodeError):
            at = messages[len(found)]
            where = f"{at.topic()}[{at.partition()}] at offset {at.offset()}"
            log.warning("%s: a header's name is not UTF-8; stored without headers", where)
            found.append(_UNREADABLE)
    return found


def _headers(found: list[Any]) -> pa.Array:
    """The headers of each record in order; a record without any has an empty list, one whose cannot be read NULL."""
    kind = RAW_SCHEMA.field("headers").type
    if (
        found and found[0] is not _UNREADABLE and found.count(found[0]) == len(found)
    ):  # the rule: all of a producer's records have the same, or none
        return pa.array([found[0] or ()], kind).take(pa.repeat(0, len(found)))
    each = [() if headers is _UNREADABLE else headers or () for headers in found]
    ends = pa.array(list(itertools.accumulate(map(len, each), initial=0)), pa.int64())
    pairs = list(itertools.chain.from_iterable(each))
    names = pa.array([name for name, _ in pairs], pa.large_string())
    values = pa.array([value for _, value in pairs], pa.large_binary())
    unreadable = pa.array([headers is _UNREADABLE for headers in found]) if _UNREADABLE in found else None
    return pa.LargeListArray.from_arrays(
        ends, pa.StructArray.from_arrays([names, values], fields=list(_HEADER)), type=kind, mask=unreadable
    )
