"""Parsing of product events in one pass over the JSON, against Python's own reader, one event at a time."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.declarations import load_declarations
from lakehouse.plans import frame
from transforms.product.parsing import NESTED, Lateness, _read_sql, parse, sent_fields

DECLARED = load_declarations(Path("catalog"))["product.events"]
ALLOWED = Lateness(timedelta(hours=72), timedelta(days=30), timedelta(minutes=10))
RECEIVED = datetime(2026, 1, 10, 12, 0, 5, tzinfo=UTC)
FIELDS = sent_fields(DECLARED)
TEXTS = [f for f, kind in FIELDS.items() if kind == "VARCHAR" and f not in NESTED]

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6) | st.sampled_from(
    ["", '"', "\\", "\\n", 'a"b']
)
values = st.one_of(words, words, st.none(), st.integers(0, 9), st.booleans(), st.lists(words, max_size=2), st.just({"a": 1}))
events = st.fixed_dictionaries(
    {"event_id": values, "event_name": words, "occurred_at": st.just("2026-01-10T12:00:00Z")},
    optional=dict.fromkeys(("workspace_id", "user_id", "feature", "properties", "unknown", 'od"d'), values)
    | {"schema_version": st.sampled_from([3, None, "x", [1]])},
)


INSTANTS = (
    """
2026-01-10T12:00:00Z|2026-01-10T12:00:00.5Z|2026-01-10T12:00:00.123456Z|2026-01-10T12:00:00.1234567Z|2026-01-10 12:00:00Z
2026-01-10T14:00:00+02:00|2026-01-10T14:00:00.1+02|2026-01-10T12:00:00|2026-1-10T12:00:00.00Z|2026-01-10T12:00:60Z
2026-01-10T24:00:00Z|2026-02-30T12:00:00Z|2026-01-10T12:10:05Z|2026-01-10T12:10:05.000001Z|2025-12-11T12:00:05Z
2025-12-11T12:00:04.999999Z|2026-01-07T12:00:05Z|2026-01-07T12:00:04.999Z|0000-01-01T00:00:00Z|1969-12-31T23:59:59.999999Z
9999-12-31T23:59:59Z|12026-01-10T12:00:00Z|2026-01-10T12:00:00.Z|2026-01-10t12:00:00z| 2026-01-10T12:00:00Z|1768046400
2026-01-10T12:00:00Z |\u0662\u0660\u0662\u0666-01-10T12:00:00Z|
""".strip("\n")
    .replace("\n", "|")
    .split("|")
)
times = st.one_of(st.just(INSTANTS[1]), st.sampled_from(INSTANTS), values)
PIECES = st.one_of(
    st.tuples(st.sampled_from([*TEXTS, *NESTED, "other", "a b"]), values),
    st.tuples(st.sampled_from(["occurred_at", "sent_at"]), times),
    st.tuples(st.just("schema_version"), st.sampled_from([3, -0.0, 1e2, 2**31, 2**70, True, "7", None])),
)
"""Members of an object, of which a name may come twice."""


@pytest.fixture(scope="module")
def connection() -> duckdb.DuckDBPyConnection:
    found = duckdb.connect()
    found.execute("SET TimeZone = 'UTC'")
    found.execute("CREATE SCHEMA raw")
    return found


def parsed(connection: duckdb.DuckDBPyConnection, payloads: list[bytes | None]) -> pl.DataFrame:
    n = len(payloads)
    table = pa.table(
        {
            "topic": ["t"] * n,
            "partition": [0] * n,
            "offset": list(range(n)),
            "received_at": pa.array([RECEIVED] * n, pa.timestamp("us", "UTC")),
            "payload": pa.array(payloads, pa.binary()),
        }
    )
    connection.register("records", table)
    connection.execute("CREATE OR REPLACE VIEW raw.product_events AS SELECT * FROM records")
    return parse(connection, DECLARED, ALLOWED).sort("offset")


def expected_reason(event: dict[str, Any]) -> str | None:
    for field in ("event_id", "event_name", "occurred_at"):
        if event.get(field) is None:
            return f"missing_{field}"
    for field in TEXTS:
        if not isinstance(event.get(field), str | None):
            return f"wrong_type_{field}"
    return None if event.get("schema_version") in (3, None) else "wrong_type_schema_version"


@given(st.lists(events, min_size=1, max_size=20), st.booleans())
def test_a_batch_is_read_as_each_event_alone(
    connection: duckdb.DuckDBPyConnection, sent: list[dict[str, Any]], escape: bool
) -> None:
    rows = parsed(connection, [json.dumps(e, ensure_ascii=escape).encode() for e in sent]).to_dicts()
    for event, row in zip(sent, rows, strict=True):
        assert row["reason"] == expected_reason(event)
        if row["reason"] is None:
            assert {f: row[f] for f in TEXTS} == {f: event.get(f) for f in TEXTS}
            assert row["properties"] is None or json.loads(row["properties"]) == event["properties"]
            unknown = {k: v for k, v in event.items() if k in ("unknown", 'od"d')}
            assert (json.loads(row["extra"]) if row["extra"] else {}) == unknown


def test_one_bad_record_among_many_costs_no_other(connection: duckdb.DuckDBPyConnection) -> None:
    good = json.dumps({"event_id": "a", "event_name": "n", "occurred_at": "2026-01-10T12:00:00Z"}).encode()
    rows = parsed(connection, [*([good] * 50), b"\xff", b'{"event_id"', b"[]", b"", None, b" \n" + good, *([good] * 50)])
    assert rows["reason"].to_list() == [None] * 50 + ["not_json"] * 4 + ["tombstone"] + [None] * 51


@given(
    st.lists(st.tuples(times, st.lists(PIECES, max_size=6), st.booleans(), st.sampled_from(["", " "])), min_size=1, max_size=30)
)
def test_what_is_read_by_whole_columns_is_what_sql_says(
    connection: duckdb.DuckDBPyConnection, sent: list[tuple[Any, list[tuple[str, Any]], bool, str]]
) -> None:
    payloads: list[bytes | None] = []
    for at, pieces, escape, blank in sent:
        told = [("event_id", "e"), ("event_name", "n"), ("occurred_at", at), *pieces]
        members = (f"{json.dumps(k)}:{blank}{json.dumps(v, ensure_ascii=escape)}" for k, v in told)
        payloads.append(("{" + ",".join(members) + "}").encode())
    rows = parsed(connection, payloads)
    wanted = frame(connection, _read_sql(FIELDS, ALLOWED, "raw.product_events")).sort("offset").select(rows.columns)
    assert rows["reason"].to_list() == wanted["reason"].to_list()
    good = pl.col("reason").is_null()
    assert rows.filter(good).equals(wanted.filter(good))
