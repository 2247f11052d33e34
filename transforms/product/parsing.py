"""Raw product events -> typed rows, and for each that cannot be used the reason.

One pass over the JSON: its declared top-level fields as JSON texts, whose first character tells the type. What the fields are
is said by the declaration of product.events, so a field is promoted out of `extra` by declaring its column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import duckdb

from lakehouse.declarations import Declaration
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


@dataclass(frozen=True)
class Lateness:
    """SQL intervals. late: from then on an event is flagged; too_late, too_early: from then on, or that far ahead, refused."""

    late: str
    too_late: str
    too_early: str


def sent_fields(declared: Declaration) -> dict[str, str]:
    """{field of an event as sent: DuckDB type of its column}, from the declaration."""
    return {c.name: DUCKDB_TYPES[str(c.type)] for c in declared.columns if c.name not in MADE_HERE}


def parse(connection: duckdb.DuckDBPyConnection, declared: Declaration, allowed: Lateness) -> None:
    """Make the relation `parsed` from raw.product_events: coordinates, typed columns, and `reason`: NULL if the row is good."""
    connection.execute(_parse_sql(sent_fields(declared), allowed))


def _parse_sql(fields: dict[str, str], allowed: Lateness) -> str:
    shape = "{" + ", ".join(f'"{f}": "JSON"' for f in fields) + "}"
    present = " + ".join(f"(v.{f} IS NOT NULL)::INT" for f in fields)
    undeclared = "{" + ", ".join(f'"{f}": null' for f in fields) + "}"
    names = "[" + ", ".join(f"'{f}'" for f in fields) + "]"
    typed = ", ".join(f"{_value(f, kind)} AS {f}" for f, kind in fields.items())
    missing = " ".join(f"WHEN v.{f} IS NULL THEN 'missing_{f}'" for f in REQUIRED)
    strings = [f for f, kind in fields.items() if kind in ("VARCHAR", "TIMESTAMPTZ") and f not in NESTED]
    wrong = _wrong(strings, lambda f: f"NOT starts_with(v.{f}, '\"')")
    unfit = _wrong([f for f in fields if f not in (*strings, *NESTED)], lambda f: f"{f} IS NULL AND v.{f} IS NOT NULL")
    return f"""
    CREATE OR REPLACE TEMP TABLE parsed AS
    WITH decoded AS (
        SELECT
            topic, partition, "offset", received_at, payload IS NULL AS tombstone, octet_length(payload) > {LARGEST} AS too_large,
            CASE WHEN octet_length(payload) <= {LARGEST} THEN try(decode(payload)) END AS body
        FROM raw.product_events
    ),
    read AS (
        SELECT
            * EXCLUDE (body), starts_with(ltrim(body, E' \\t\\r\\n'), '{{') AS is_object, body,
            try(json_transform(body, '{shape}')) AS v, try(len(json_keys(body))) AS keys
        FROM decoded
    ),
    typed AS (
        SELECT
            topic, partition, "offset", received_at, tombstone, too_large, v,
            coalesce(is_object AND v IS NOT NULL, false) AS is_object,
            CASE WHEN is_object AND keys > {present} THEN
                CASE WHEN len(list_filter(json_keys(body), lambda k: NOT list_contains({names}, k))) > 0
                    THEN CAST(json_merge_patch(body, '{undeclared}') AS VARCHAR) END
            END AS extra,
            {typed}
        FROM read
    )
    SELECT
        * EXCLUDE (v, tombstone, too_large, is_object),
        epoch_ms(received_at) // 1000 - epoch_ms(occurred_at) // 1000 AS lateness_seconds,
        received_at - occurred_at > {allowed.late} AS late,
        CASE
            WHEN tombstone THEN 'tombstone'
            WHEN too_large THEN 'too_large'
            WHEN NOT is_object THEN 'not_json'
            {missing}
            {wrong}
            WHEN occurred_at IS NULL THEN 'bad_occurred_at'
            {unfit}
            WHEN occurred_at < received_at - {allowed.too_late} THEN 'too_late'
            WHEN occurred_at > received_at + {allowed.too_early} THEN 'from_the_future'
        END AS reason
    FROM typed
    """


def _value(field: str, kind: str) -> str:
    """SQL: the typed value of a field, from its JSON text `v.field`; NULL where it does not fit."""
    if field in NESTED:
        return f"v.{field}"
    bare = f"substring(v.{field}, 2, length(v.{field}) - 2)"
    if kind == "TIMESTAMPTZ":
        return f"CASE WHEN regexp_full_match({bare}, '{INSTANT}') THEN TRY_CAST({bare} AS TIMESTAMPTZ) END"
    if kind == "VARCHAR":
        return f"CASE WHEN contains(v.{field}, '\\') THEN v.{field} ->> '$' ELSE {bare} END"
    return f"TRY_CAST(v.{field} ->> '$' AS {kind})"


def _wrong(fields: Iterable[str], holds: Callable[[str], str]) -> str:
    return " ".join(f"WHEN {holds(f)} THEN 'wrong_type_{f}'" for f in fields)
