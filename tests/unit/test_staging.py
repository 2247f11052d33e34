"""Rows become Parquet files: which file a row goes to, what a reader can prune by, and what is left of a batch given up."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.conversions import from_bytes

from lakehouse import append
from lakehouse.append import Append
from lakehouse.errors import ChecksFailed, Retryable
from lakehouse.lake import Lake, open_lake
from lakehouse.settings import Settings
from lakehouse.staging import MOST_OPEN_FILES, OpenFiles, conform, stage
from writers.records import RAW_SCHEMA, received_by_kafka

RAW = "raw.product_events"
DAY = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return open_lake(Settings(home=tmp_path / "home"))


def records(partition: int, start: int, stop: int, day: int = 0, payload: bytes = b"{}") -> pa.Table:
    """Rows of raw.product_events with offsets `start` up to `stop`."""
    n = stop - start
    at = [DAY + timedelta(days=day, seconds=i) for i in range(n)]
    columns = [["t"] * n, [partition] * n, range(start, stop), at, [b"key"] * n, [[]] * n, [payload] * n]
    return received_by_kafka(pa.table(columns, schema=RAW_SCHEMA))


def path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def written(lake: Lake) -> list[Path]:
    return list((lake.settings.home / "warehouse").glob("**/*.parquet"))


def test_each_partition_has_one_file_however_often_rows_come(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    files = OpenFiles(table, lake.declaration(RAW))
    for start in (0, 10, 20):
        both = pa.concat_tables([records(0, start, start + 10), records(1, start, start + 10, day=1)])
        files.write(conform(table, both))
    done = files.close()
    assert [(f.record_count, f.partition[0]) for f in done] == [
        (30, (DAY - datetime(1970, 1, 1, tzinfo=UTC)).days + d) for d in (0, 1)
    ]
    for file in done:
        parquet = pq.ParquetFile(path(file.file_path))
        assert parquet.metadata.num_row_groups == 3
        assert parquet.read(["offset"]).column("offset").to_pylist() == list(range(30))
        assert path(file.file_path).stat().st_size == file.file_size_in_bytes
        assert parquet.schema_arrow.field("payload").metadata[b"PARQUET:field_id"] == b"7"


def test_row_groups_are_as_small_as_declared(lake: Lake) -> None:
    declared = msgspec.structs.replace(lake.declaration(RAW), row_group_rows=4)
    (file,) = stage(lake.open_for_write(RAW), declared, records(0, 0, 10))
    groups = pq.ParquetFile(path(file.file_path)).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [4, 4, 2]


def test_bounds_let_offsets_be_pruned_and_tell_nothing_of_payloads(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    files = OpenFiles(table, lake.declaration(RAW))
    files.write(conform(table, pa.concat_tables([records(0, 5, 9, payload=b"jane@example.com"), records(3, 7, 20)])))
    (file,) = files.close()
    bounds = {
        f.name: tuple(from_bytes(f.field_type, b[f.field_id]) for b in (file.lower_bounds, file.upper_bounds))
        for f in table.schema().fields
        if f.field_id in file.lower_bounds
    }
    assert set(bounds) == {"topic", "partition", "offset", "kafka_timestamp", "received_at"}
    assert (bounds["topic"], bounds["partition"], bounds["offset"]) == (("t", "t"), (0, 3), (5, 19))
    payload = pq.ParquetFile(path(file.file_path)).metadata.row_group(0).column(7)
    assert (payload.path_in_schema, payload.is_stats_set) == ("payload", False)


def test_a_new_file_begins_at_the_target_size(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    with table.transaction() as change:
        change.set_properties({"write.target-file-size-bytes": "1000"})
    files = OpenFiles(table, lake.declaration(RAW))
    for start in range(3):
        files.write(conform(table, records(0, start, start + 1, payload=random.randbytes(2_000))))
    assert [f.record_count for f in files.close()] == [1, 1, 1]


def test_files_given_up_are_removed(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    files = OpenFiles(table, lake.declaration(RAW))
    files.write(conform(table, records(0, 0, 5)))
    assert len(written(lake)) == 1
    files.abandon()
    assert written(lake) == []


def test_a_batch_goes_to_disk_while_it_grows(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two partitions in turns: row groups are full at a size, and sorted by the coordinates within."""
    monkeypatch.setattr(append, "ROW_GROUP_BYTES", 40_000)
    batch = Append(lake, RAW, {})
    held = []
    for start in range(0, 300, 10):
        for partition in (1, 0):
            batch.add(records(partition, start, start + 10, payload=b"x" * 1000))
            held.append(batch._waiting_bytes)
    assert max(held) < 60_000
    batch.commit()
    (file,) = written(lake)
    groups = pq.ParquetFile(file)
    found = [groups.read_row_group(i, ["partition", "offset"]).to_pylist() for i in range(groups.num_row_groups)]
    assert len(found) > 10
    assert all(g == sorted(g, key=lambda r: (r["partition"], r["offset"])) for g in found)
    assert sum(map(len, found)) == batch.rows == 600
    assert lake.vector(RAW) == {("t", 0): 300, ("t", 1): 300}


@pytest.mark.parametrize("again", [records(0, 4, 8), records(0, 0, 2), pa.concat_tables([records(0, 7, 8), records(0, 6, 7)])])
def test_records_that_come_again_or_out_of_order_are_refused(lake: Lake, again: pa.Table) -> None:
    batch = Append(lake, RAW, {("t", 0): 3})
    batch.add(records(0, 3, 5))
    with pytest.raises(Retryable, match=r"t\[0\]: offsets .* came again or out of order"):
        batch.add(again)
    batch.abandon()


def test_offsets_that_kafka_left_out_are_no_gap(lake: Lake) -> None:
    """Compaction and the markers of transactions leave offsets out."""
    batch = Append(lake, RAW, {})
    batch.add(records(0, 5, 6))
    batch.add(records(0, 9, 10))
    batch.commit()
    assert lake.vector(RAW) == {("t", 0): 10}


def test_rows_that_break_a_rule_are_held_and_leave_no_file(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "ROW_GROUP_BYTES", 1)
    batch = Append(lake, "raw.stripe_events", {})
    stripe = records(0, 0, 5)
    batch.add(stripe.append_column("source", pa.array(["webhook"] * 5)))
    wrong = records(0, 5, 10).append_column("source", pa.array(["webhook", "telex", None, "telex", "webhook"]))
    batch.add(wrong)
    with pytest.raises(ChecksFailed, match=r"accepted\(source\): 2 rows"):
        batch.commit()
    assert written(lake) == []
    assert lake.load("raw.stripe_events").current_snapshot() is None


def test_a_missing_time_of_receipt_is_held(lake: Lake) -> None:
    batch = Append(lake, RAW, {})
    batch.add(records(0, 0, 1).drop_columns(["received_at"]))
    with pytest.raises(ChecksFailed, match=r"not_null\(received_at\): 1 rows"):
        batch.commit()


def test_a_batch_of_any_number_of_days_has_few_files_open_at_once(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    files = OpenFiles(table, lake.declaration(RAW))
    days = MOST_OPEN_FILES + 5
    for day in [*range(days), days - 1, 0]:  # the last one is open still; the first was closed, and goes on in another file
        files.write(conform(table, records(0, day * 10, day * 10 + 10, day=day)))
        assert len(files._open) <= MOST_OPEN_FILES
    done = files.close()
    assert sorted(f.record_count for f in done) == [10] * days + [20]
    assert len(written(lake)) == len(done)
