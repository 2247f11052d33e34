"""Time partitions over every kind of time column: retention and compaction find the manifests and the files."""

from __future__ import annotations

import itertools
import uuid
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.io.pyarrow import _dataframe_to_data_files
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.transforms import parse_transform
from pyiceberg.types import DateType, NestedField, TimestampType, TimestamptzType

from lakehouse.declarations import Declaration
from lakehouse.maintenance.compact import plan_compaction
from lakehouse.maintenance.planning import files_listed, time_partition
from lakehouse.maintenance.retention import outdated
from lakehouse.predicates import at_least, below
from lakehouse.settings import Settings

KINDS = {
    "timestamptz": (pa.timestamp("us", "UTC"), datetime(2026, 3, 1, 12, tzinfo=UTC)),
    "timestamp": (pa.timestamp("us"), datetime(2026, 3, 1, 12)),  # noqa: DTZ001 - a time without zone is meant
    "date": (pa.date32(), date(2026, 3, 1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", ["day", "month", "year"])
def test_files_are_found_by_the_time_of_their_partition(tmp_path: Path, kind: str, transform: str) -> None:
    table = _table(tmp_path, kind, transform)
    _append(table, kind)
    part = time_partition(table)
    assert part is not None
    assert (part.place, part.column, part.transform) == (0, "at", transform)
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert len(list(files_listed(table, at_least("at", part.value(noon))))) == 1
    assert list(files_listed(table, below("at", part.value(noon - timedelta(days=400))))) == []
    declared = Declaration("raw.t", "", "", "", ["at"], None, [], retention_days=10)  # type: ignore[arg-type]
    end = {
        "day": datetime(2026, 3, 2, tzinfo=UTC),
        "month": datetime(2026, 4, 1, tzinfo=UTC),
        "year": datetime(2027, 1, 1, tzinfo=UTC),
    }
    assert outdated(table, declared, end[transform] + timedelta(days=10) - timedelta(seconds=1)) == []
    assert len(outdated(table, declared, end[transform] + timedelta(days=10))) == 1


@pytest.mark.parametrize(("transform", "bins"), [("day", 0), ("month", 0), ("year", 1)])
def test_of_years_all_are_looked_at_for_small_files(tmp_path: Path, transform: str, bins: int) -> None:
    """A late event puts a small file into the history of any year; of days and months there are too many."""
    table = _table(tmp_path, "timestamptz", transform)
    for _ in range(3):
        _append(table, "timestamptz")
    settings = Settings(home=tmp_path, compact_cold_minutes=0)
    found = plan_compaction(table, settings, datetime.now(UTC) + timedelta(days=3_650))
    assert [len(files) for files in found] == [3] * bins


def _table(home: Path, kind: str, transform: str) -> Table:
    """A table of one column, `at`, partitioned by it."""
    schema = Schema(NestedField(1, "at", _type(kind), required=False))
    spec = PartitionSpec(PartitionField(1, 1000, parse_transform(transform), "at_part"))
    catalog = load_catalog("lake", type="sql", uri=f"sqlite:///{home / 'c.db'}", warehouse=f"file://{home / 'w'}")
    catalog.create_namespace("raw")
    return catalog.create_table("raw.t", schema, partition_spec=spec)


def _append(table: Table, kind: str) -> None:
    arrow, value = KINDS[kind]
    rows: Any = pa.table({"at": pa.array([value], arrow)})
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        for file in _dataframe_to_data_files(table.metadata, rows, table.io, uuid.uuid4(), itertools.count()):
            append.append_data_file(file)
    table.refresh()


def _type(kind: str) -> Any:
    return {"timestamptz": TimestamptzType(), "timestamp": TimestampType(), "date": DateType()}[kind]
