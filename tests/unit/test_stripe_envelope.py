"""The envelope that is read out of a webhook: what is no date, or no JSON, is NULL and stops nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lakehouse.append import append_rows
from lakehouse.lake import open_lake
from lakehouse.queries import connect
from lakehouse.settings import Settings
from writers.records import RAW_SCHEMA
from writers.stripe import with_envelope

STORED = datetime(2026, 1, 1, tzinfo=UTC)


def envelope(payload: bytes, received_at: bytes, folder: Path) -> dict[str, Any]:
    """The row of one record, after it was committed: a value that no Iceberg reader can hold fails there at the latest."""
    row = [["t"], [0], [0], [STORED], [b"k"], [[("received_at", received_at), ("source", b"webhook")]], [payload]]
    lake = open_lake(Settings(home=folder / "home"))
    with connect(lake.settings) as connection:
        found = with_envelope(connection, pa.table(row, schema=RAW_SCHEMA))
    append_rows(lake, "raw.stripe_events", found, {}, {})
    (only,) = found.to_pylist()
    return only


@pytest.mark.parametrize("said", ["infinity", "-infinity", "10000-01-01T00:00:00Z", "290000-01-01T00:00:00Z", "soon"])
def test_a_receipt_that_is_no_date_is_the_time_kafka_took_it(said: str, tmp_path: Path) -> None:
    assert envelope(b"{}", said.encode(), tmp_path)["received_at"] == STORED


@pytest.mark.parametrize("created", [1_767_225_600_000, -(10**12), 253_402_300_800, 2**63, 1e300, "x", None, [1]])
def test_a_created_that_is_no_date_is_null(created: object, tmp_path: Path) -> None:
    row = envelope(json.dumps({"id": "evt_1", "created": created}).encode(), b"2026-02-03T00:00:00Z", tmp_path)
    assert (row["event_id"], row["created_at"]) == ("evt_1", None)
    assert row["received_at"] == datetime(2026, 2, 3, tzinfo=UTC)
