"""Raw product events -> typed rows, and for each that cannot be used the reason.

One pass over the JSON: its declared top-level fields as JSON texts, whose first character tells the type. What the fields are
is said by the declaration of product.events, so a field is promoted out of `extra` by declaring its column.

What a row means is said once, in SQL (`_read_sql`). Nearly all rows are plain: every field declared, no escapes, instants as
JavaScript writes them, nothing to refuse. What SQL would make of these is made of whole columns at a third of the cost
(`_plain`), and SQL is asked about the others; that both agree is a property (tests/properties/test_parsing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import duckdb
import polars as pl

from lakehouse.coordinates import COORDINATES
from lakehouse.declarations import Declaration
from lakehouse.plans import frame
from lakehouse.queries import DUCKDB_TYPES
from transforms.product.attribution import ATTRIBUTED

REQUIRED = ("event_id", "event_name", "occurred_at")

NESTED = ("properties", "context")
"""Kept as JSON text, whatever they hold."""

MADE_HERE = ("extra", "content_hash", "received_at", "lateness_seconds", "late", *ATTRIBUTED, "topic", "partition", "offset")
"""Columns of the table that are no fields of the event as sent; all others are."""

LARGEST = 2**20
"""Bytes of a payload, Kafka's own default for a message: a larger one is refused, so that no batch outgrows the memory."""

INSTANT = r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?(Z|[+-]\d{2}(:?\d{2})?)"
"""An instant with its zone; anything else (no zone, an epoch number) is refused rather than guessed."""


PLAIN_INSTANT = r'^"[12][0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]{1,6})?Z"$'
"""The instants (as JSON texts) that Polars reads as DuckDB does, if the date exists."""

CONTENT = (
    "event_name", "occurred_at", "workspace_id", "user_id", "anonymous_id", "session_id", "feature", "platform", "app_version",
    "country", "schema_version", "properties", "context", "extra",
)  # fmt: skip
"""What the copies of an event have to agree in: all that it says, not how it was delivered (sent_at, ip, user_agent)."""


@dataclass(frozen=True)
class Lateness:
    """late: if it is received more than that after it happened, an event is flagged; too_late: refused; too_early: refused if it
    is said to happen more than that after it was received."""

    late: timedelta
    too_late: timedelta
    too_early: timedelta


def sent_fields(declared: Declaration) -> dict[str, str]:
    """{field of an event as sent: DuckDB type of its column}, from the declaration."""
    return {c.name: DUCKDB_TYPES[str(c.type)] for c in declared.columns if c.name not in MADE_HERE}


def parse(connection: duckdb.DuckDBPyConnection, declared: Declaration, allowed: Lateness) -> pl.DataFrame:
    """The rows of raw.product_events, which is a relation in memory, read: one each, in no order.

    Returns:
        Columns topic, partition, offset, received_at; `reason` why the row cannot be used, NULL if it can; of those that can
        the columns of the table that are said by the event, `extra` among them; content_hash: of CONTENT as JSON texts, a filter
        and never a proof that copies differ; id_hash: DuckDB's hash of event_id.
    """
    fields = sent_fields(declared)
    texts = frame(connection, _texts_sql(fields))
    plain, sure = _plain(texts, fields, allowed)
    if sure.all():
        return plain
    connection.register("__others", texts.filter(~sure).select(COORDINATES).to_arrow())
    others = frame(
        connection, _read_sql(fields, allowed, 'raw.product_events SEMI JOIN __others USING (topic, partition, "offset")')
    )
    return pl.concat([plain.filter(sure), others.select(plain.columns)], how="vertical_relaxed")


def _texts_sql(fields: Mapping[str, str]) -> str:
    """SELECT of the coordinates, each text or time as JSON text, any other field as its value, the hashes; and `whole`: the
    record is an object with no field but these, each of which fits."""
    values = {f: kind for f, kind in fields.items() if kind not in ("VARCHAR", "TIMESTAMPTZ")}
    told = ", ".join(f"{_value(f, kind)} AS {f}" if f in values else f"v.{f}" for f, kind in fields.items())
    fits = " AND ".join([f"keys = {_present(fields)}", *(f"({f} IS NOT NULL OR v.{f} IS NULL)" for f in values)])
    bare = _bare("event_id")
    return f"""
    SELECT
        topic, partition, "offset", received_at, {told}, coalesce({fits}, false) AS whole,
        {_content_hash("NULL")} AS content_hash, hash({bare}) AS id_hash
    FROM (
        SELECT
            topic, partition, "offset", received_at,
            try(json_transform(body, '{_shape(fields)}')) AS v, try(len(json_keys(body))) AS keys
        FROM ({_bodies_sql("raw.product_events")})
    )
    """


def _plain(texts: pl.DataFrame, fields: Mapping[str, str], allowed: Lateness) -> tuple[pl.DataFrame, pl.Series]:
    """(the rows of `_texts_sql` as `parse` gives them, which of them are certain to be what `_read_sql` makes of them)."""
    strings = [f for f, kind in fields.items() if kind == "VARCHAR" and f not in NESTED]
    times = [f for f, kind in fields.items() if kind == "TIMESTAMPTZ"]
    read = texts.with_columns(
        *(pl.col(f).str.slice(1).str.head(-1) for f in strings),
        *(pl.col(f).str.to_datetime('"%Y-%m-%dT%H:%M:%S%.fZ"', time_unit="us", time_zone="UTC", strict=False) for f in times),
    )
    age = pl.col("received_at") - pl.col("occurred_at")
    unescaped = [pl.col(f).str.starts_with('"') & ~pl.col(f).str.contains("\\", literal=True) for f in strings]
    sure = texts.select(
        pl.all_horizontal(
            "whole",
            *(pl.col(f).is_not_null() for f in REQUIRED),
            *(u.fill_null(value=True) for u in unescaped),
            *(pl.col(f).str.contains(PLAIN_INSTANT).fill_null(value=True) for f in times),
            *(read[f].is_not_null() | pl.col(f).is_null() for f in times),
            read.select(age.is_between(-allowed.too_early, allowed.too_late)).to_series(),
        ).fill_null(value=False)
    ).to_series()
    lateness = pl.col("received_at").dt.epoch("s") - pl.col("occurred_at").dt.epoch("s")
    nothing = pl.lit(None, pl.String)
    return (
        read.drop("whole").with_columns(extra=nothing, lateness_seconds=lateness, late=age > allowed.late, reason=nothing),
        sure,
    )


def _bodies_sql(records: str) -> str:
    """SELECT of the records with `body`, their text: NULL if there is none, or too much, or it is not UTF-8."""
    return f"""
    SELECT
        topic, partition, "offset", received_at, payload IS NULL AS tombstone, octet_length(payload) > {LARGEST} AS too_large,
        CASE WHEN octet_length(payload) <= {LARGEST} THEN try(decode(payload)) END AS body
    FROM {records}
    """


def _read_sql(fields: Mapping[str, str], allowed: Lateness, records: str) -> str:
    """SELECT of what `parse` says of the records (an SQL table expression)."""
    undeclared = "{" + ", ".join(f'"{f}": null' for f in fields) + "}"
    names = "[" + ", ".join(f"'{f}'" for f in fields) + "]"
    typed = ", ".join(f"{_value(f, kind)} AS {f}" for f, kind in fields.items())
    missing = " ".join(f"WHEN v.{f} IS NULL THEN 'missing_{f}'" for f in REQUIRED)
    strings = [f for f, kind in fields.items() if kind in ("VARCHAR", "TIMESTAMPTZ") and f not in NESTED]
    wrong = _wrong(strings, lambda f: f"NOT starts_with(v.{f}, '\"')")
    unfit = _wrong([f for f in fields if f not in (*strings, *NESTED)], lambda f: f"{f} IS NULL AND v.{f} IS NOT NULL")
    return f"""
    WITH read AS (
        SELECT
            * EXCLUDE (body), starts_with(ltrim(body, E' \\t\\r\\n'), '{{') AS is_object, body,
            try(json_transform(body, '{_shape(fields)}')) AS v, try(len(json_keys(body))) AS keys
        FROM ({_bodies_sql(records)})
    ),
    typed AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, too_large, v,
            coalesce(is_object AND v IS NOT NULL, false) AS is_object,
            CASE WHEN is_object AND keys > {_present(fields)} THEN
                CASE WHEN len(list_filter(json_keys(body), lambda k: NOT list_contains({names}, k))) > 0
                    THEN CAST(json_merge_patch(body, '{undeclared}') AS VARCHAR) END
            END AS extra,
            {typed}
        FROM read
    )
    SELECT
        * EXCLUDE (v, tombstone, too_large, is_object),
        epoch_ms(received_at) // 1000 - epoch_ms(occurred_at) // 1000 AS lateness_seconds,
        received_at - occurred_at > {_interval(allowed.late)} AS late,
        {_content_hash("extra")} AS content_hash, hash(event_id) AS id_hash,
        CASE
            WHEN tombstone THEN 'tombstone'
            WHEN too_large THEN 'too_large'
            WHEN NOT is_object THEN 'not_json'
            {missing}
            {wrong}
            WHEN occurred_at IS NULL THEN 'bad_occurred_at'
            {unfit}
            WHEN occurred_at < received_at - {_interval(allowed.too_late)} THEN 'too_late'
            WHEN occurred_at > received_at + {_interval(allowed.too_early)} THEN 'from_the_future'
        END AS reason
    FROM typed
    """


def _shape(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{f}": "JSON"' for f in fields) + "}"


def _present(fields: Mapping[str, str]) -> str:
    """SQL: how many of the fields the record has; NULL is none."""
    return "(" + " + ".join(f"(v.{f} IS NOT NULL)::INT" for f in fields) + ")"


def _content_hash(extra: str) -> str:
    return f"(hash({', '.join(extra if c == 'extra' else f'v.{c}' for c in CONTENT)}) >> 1)::BIGINT"


def _interval(length: timedelta) -> str:
    return f"to_microseconds({length // timedelta(microseconds=1)})"


def _bare(field: str) -> str:
    """SQL: the text between the quotes of a JSON text."""
    return f"substring(v.{field}, 2, length(v.{field}) - 2)"


def _value(field: str, kind: str) -> str:
    """SQL: the typed value of a field, from its JSON text `v.field`; NULL where it does not fit."""
    if field in NESTED:
        return f"v.{field}"
    bare = _bare(field)
    if kind == "TIMESTAMPTZ":
        return f"CASE WHEN regexp_full_match({bare}, '{INSTANT}') THEN TRY_CAST({bare} AS TIMESTAMPTZ) END"
    if kind == "VARCHAR":
        return f"CASE WHEN contains(v.{field}, '\\') THEN v.{field} ->> '$' ELSE {bare} END"
    return f"TRY_CAST(v.{field} ->> '$' AS {kind})"


def _wrong(fields: Iterable[str], holds: Callable[[str], str]) -> str:
    return " ".join(f"WHEN {holds(f)} THEN 'wrong_type_{f}'" for f in fields)
