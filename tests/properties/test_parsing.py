"""Parsing of product events in one pass over the JSON, against Python's own reader, one event at a time."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lakehouse.declarations import load_declarations
from transforms.product.parsing import Lateness, parse, sent_fields

DECLARED = load_declarations(Path("catalog"))["product.events"]
ALLOWED = Lateness("INTERVAL 72 HOUR", "INTERVAL 30 DAY", "INTERVAL 10 MINUTE")
RECEIVED = datetime(2026, 1, 10, 12, 0, 5, tzinfo=UTC)
TEXTS = [f for f, kind in sent_fields(DECLARED).items() if kind == "VARCHAR" and f not in ("properties", "context")]

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6) | st.sampled_from(
    ["", '"', "\\", "\\n", 'a"b']
)
values = st.one_of(words, words, st.none(), st.integers(0, 9), st.booleans(), st.lists(words, max_size=2), st.just({"a": 1}))
events = st.fixed_dictionaries(
    {"event_id": values, "event_name": words, "occurred_at": st.just("2026-01-10T12:00:00Z")},
    optional=dict.fromkeys(("workspace_id", "user_id", "feature", "properties", "unknown", 'od"d'), values)
    | {"schema_version": st.sampled_from([3, None, "x", [1]])},
)


@pytest.fixture(scope="module")
def connection() -> duckdb.DuckDBPyConnection:
    found = duckdb.connect()
    found.execute("SET TimeZone = 'UTC'")
    found.execute("CREATE SCHEMA raw")
    return found


def parsed(connection: duckdb.DuckDBPyConnection, payloads: list[bytes | None]) -> list[dict[str, Any]]:
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
    parse(connection, DECLARED, ALLOWED)
    return connection.execute('SELECT * FROM parsed ORDER BY "offset"').to_arrow_table().to_pylist()


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
    rows = parsed(connection, [json.dumps(e, ensure_ascii=escape).encode() for e in sent])
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
    assert [r["reason"] for r in rows] == [None] * 50 + ["not_json"] * 4 + ["tombstone"] + [None] * 51
