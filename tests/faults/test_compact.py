"""Compaction: the same rows in other files, whoever else writes meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, TableProperties
from records import (
    DAY,
    RAW,
    THINGS,
    Wire,
    append,
    append_change,
    first,
    live_files,
    lost_after,
    offsets,
    position,
    rewrite,
    rewrite_change,
    stored,
    things,
)

from lakehouse.append import append_rows
from lakehouse.commit import commit
from lakehouse.errors import Replan
from lakehouse.lake import Lake, Run, open_lake
from lakehouse.maintenance.compact import compact, merge_files, pack, plan_compaction, worth_it
from lakehouse.settings import Settings

SQLITE = pytest.mark.parametrize("kind", ["sqlite"], indirect=True)


def cold(lake: Lake) -> Lake:
    """The lake with partitions that count as cold at once, and no partition too old."""
    return replace(lake, settings=lake.settings.model_copy(update={"compact_cold_minutes": 0, "compact_days": 10_000}))


def run(lake: Lake, name: str = RAW) -> dict[str, int]:
    opened = cold(lake)
    return compact(opened, opened.declaration(name), lake.load(name))


def content(table: Table) -> Counter[str]:
    return Counter(map(repr, table.scan().to_arrow().to_pylist()))


def test_small_files_become_one_in_the_declared_order(lake: Lake) -> None:
    for i in range(6):
        append(lake, i % 2, i // 2, i // 2 + 1)
    before = content(lake.load(RAW))
    assert run(lake) == {"files": 6, "into": 1, "rows": 6, "bytes": run_bytes(lake, 6)}
    table = lake.load(RAW)
    (file,) = live_files(table)
    assert content(table) == before
    assert (file.sort_order_id, file.record_count) == (table.sort_order().order_id, 6)
    with table.io.new_input(file.file_path).open() as stream:
        parquet = pq.ParquetFile(stream)
        rows = parquet.read().to_pylist()
        ids = [f.metadata[b"PARQUET:field_id"] for f in parquet.schema_arrow]
    assert rows == sorted(rows, key=lambda r: (r["topic"], r["partition"], r["offset"]))
    assert ids == [str(f.field_id).encode() for f in table.schema().fields]
    assert [t.file for t in table.scan("offset = 2").plan_files()] == [file]
    assert [t.file for t in table.scan("offset > 2").plan_files()] == []  # pruned by statistics
    assert run(lake)["files"] == 0
    assert (position(lake, 0), position(lake, 1)) == (3, 3)


def run_bytes(lake: Lake, files: int) -> int:
    """The bytes of the files that the last compaction replaced, from the snapshot before it."""
    table = lake.load(RAW)
    current = table.current_snapshot()
    assert current is not None
    old = [t.file for t in table.scan(snapshot_id=current.parent_snapshot_id).plan_files()]
    assert len(old) == files
    return sum(f.file_size_in_bytes for f in old)


@SQLITE
def test_appends_go_on_meanwhile_and_nothing_conflicts(lake: Lake, other: Lake, wire: Wire) -> None:
    for i in range(4):
        append(lake, 0, i, i + 1)
    wire.faults = [first(lambda: append(other, 0, 4, 6)), lost_after]
    assert run(lake)["files"] == 4
    assert offsets(lake) == list(range(6))
    assert len(live_files(lake.load(RAW))) == 2
    sleeper = other.open_for_write(RAW)
    change = append_change(other, sleeper, 0, 6, 7)
    run(lake)
    commit(sleeper, other.run, change)
    assert offsets(lake) == list(range(7))


@SQLITE
def test_a_file_replaced_meanwhile_is_planned_again(lake: Lake, other: Lake, wire: Wire) -> None:
    for i in range(3):
        rewrite(lake, things({"amount": i + 1}))

    def change_one() -> None:
        rewrite(other, things({"amount": 10}), [live_files(other.load(THINGS))[0]])

    wire.faults = [first(change_one)]
    run(lake, THINGS)
    table = lake.load(THINGS)
    assert len(live_files(table)) == 1
    assert 10 in table.scan().to_arrow()["amount"].to_pylist()
    assert table.scan().to_arrow().num_rows == 3


@SQLITE
def test_a_transform_that_did_not_plan_on_these_files_does_not_plan_again(lake: Lake, other: Lake) -> None:
    """It was alone in its partition: compaction adds files there, and no rows."""
    for i in range(3):
        rewrite(lake, things({"amount": i + 1}))
    table = other.open_for_write(THINGS)
    change = rewrite_change(table, other, things({"thing_id": "t1", "amount": 9}))
    run(lake, THINGS)
    commit(table, other.run, change)
    assert lake.load(THINGS).scan().to_arrow().num_rows == 4


@SQLITE
def test_a_transform_that_planned_on_these_files_plans_again(lake: Lake, other: Lake) -> None:
    for i in range(3):
        rewrite(lake, things({"amount": i + 1}))
    table = other.open_for_write(THINGS)
    removing = rewrite_change(table, other, things({"amount": 8}), remove=live_files(table)[:1])
    assert run(lake, THINGS)["files"] == 3
    with pytest.raises(Replan):
        commit(table, other.run, removing)


@SQLITE
def test_it_may_take_longer_than_snapshots_are_kept(lake: Lake, other: Lake, wire: Wire) -> None:
    from lakehouse.declarations import KeepSnapshots
    from lakehouse.maintenance.expire import expire

    for i in range(4):
        append(lake, 0, i, i + 1)

    def meanwhile() -> None:
        append(other, 0, 4, 5)
        append(other, 0, 5, 6)
        expire(other.load(RAW), other.run, KeepSnapshots(1, 1, 0), ())

    wire.faults = [first(meanwhile)]
    assert run(lake)["files"] == 4
    assert offsets(lake) == list(range(6))


def test_every_payload_stays_byte_for_byte(tmp_path: pytest.TempPathFactory) -> None:
    """NULL, empty, not UTF-8, 1 MB; headers that are NULL, empty, repeated, with NULL values."""
    lake = open_lake(Settings(home=tmp_path / "home", compact_cold_minutes=0, compact_days=10_000), Run("one", "test"))  # type: ignore
    name = "raw.product_events"
    payloads = [None, b"", b"\x00\xff\xfe", b"x" * 2**20, b"{}", "é".encode("utf-16")]
    headers = [None, [], [{"key": "a", "value": None}], [{"key": "a", "value": b""}, {"key": "a", "value": b"\xff"}], None, []]
    for i, (payload, header) in enumerate(zip(payloads, headers, strict=True)):
        row = {"topic": "t", "partition": 0, "offset": i, "key": payload and payload[:9], "headers": header, "payload": payload}
        schema = pa.schema(
            [
                ("topic", pa.string()),
                ("partition", pa.int32()),
                ("offset", pa.int64()),
                ("key", pa.binary()),
                ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
                ("payload", pa.binary()),
                ("received_at", pa.timestamp("us", "UTC")),
                ("kafka_timestamp", pa.timestamp("us", "UTC")),
            ]
        )
        at = DAY + timedelta(microseconds=i)
        rows = pa.Table.from_pylist([row | {"received_at": at, "kafka_timestamp": at if i % 2 else None}], schema)
        append_rows(lake, name, rows, {("t", 0): i}, {("t", 0): i + 1})
    before = content(lake.load(name))
    assert compact(lake, lake.declaration(name), lake.load(name))["into"] == 1
    assert content(lake.load(name)) == before
    assert sum(before.values()) == 6
    (file,) = live_files(lake.load(name))
    numbers = {column: lake.load(name).schema().find_field(column).field_id for column in ("payload", "offset")}
    assert numbers["offset"] in file.lower_bounds
    assert numbers["payload"] not in file.lower_bounds  # as writers keep it: no bounds of a payload in a manifest


@SQLITE
def test_large_groups_are_cut_at_the_target_size(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        append(lake, 0, i * 3000, (i + 1) * 3000)
    table = lake.load(RAW)
    with table.transaction() as change:
        change.set_properties({TableProperties.WRITE_TARGET_FILE_SIZE_BYTES: "500"})  # offsets in a row cost next to nothing
    monkeypatch.setattr("lakehouse.maintenance.compact.LARGEST_ROW_GROUP", 2048)
    files = merge_files(lake, lake.declaration(RAW), table, live_files(table))
    assert sum(f.record_count for f in files) == 12_000
    assert len(files) > 2
    assert live_files(lake.load(RAW)) != files
    assert {f.file_path for f in files} <= stored(lake)


@SQLITE
def test_a_lost_row_stops_the_compaction(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    from lakehouse.errors import Terminal

    for i in range(3):
        append(lake, 0, i, i + 1)
    real = merge_files.__globals__["_groups"]
    monkeypatch.setattr("lakehouse.maintenance.compact._groups", lambda batches: (t.slice(1) for t in real(batches)))
    before = stored(lake)
    with pytest.raises(Terminal, match="3 rows went into a compaction and 2 came out"):
        run(lake)
    assert stored(lake) == before
    assert offsets(lake) == [0, 1, 2]


# --- what is worth it --------------------------------------------------------------------------------------------------


def file(size: int) -> DataFile:
    return DataFile.from_args(file_path=str(size), file_size_in_bytes=size, record_count=1)


def test_a_row_is_rewritten_a_few_times_in_its_life() -> None:
    many, few = [file(1)] * 16, [file(1)] * 3
    assert worth_it(many, 1000, 16, cold=False)
    assert not worth_it(few, 1000, 16, cold=False)
    assert worth_it(few, 1000, 16, cold=True)
    assert not worth_it([file(500), file(1)], 1000, 16, cold=True)  # a late row does not rewrite what is there
    assert worth_it([file(400), file(400)], 1000, 16, cold=False)
    assert not worth_it([file(700)], 1000, 16, cold=True)


def test_neighbours_are_packed_up_to_the_target() -> None:
    assert [[f.file_size_in_bytes for f in b] for b in pack([file(s) for s in (4, 4, 4, 9, 1)], 10)] == [[4, 4], [4], [9, 1]]
    assert pack([], 10) == []


@SQLITE
def test_only_partitions_of_the_last_days_are_looked_at(lake: Lake) -> None:
    for i in range(3):
        append(lake, 0, i, i + 1)  # received on 2026-03-01
    table = lake.load(RAW)
    settings = lake.settings.model_copy(update={"compact_cold_minutes": 0})
    assert plan_compaction(table, settings, datetime(2026, 5, 1, tzinfo=UTC)) == []
    later = datetime.now(UTC) + timedelta(hours=2)
    (files,) = plan_compaction(table, settings.model_copy(update={"compact_days": 10_000}), later)
    assert len(files) == 3
    hot = settings.model_copy(update={"compact_days": 10_000, "compact_cold_minutes": 10_000})
    assert plan_compaction(table, hot) == []
