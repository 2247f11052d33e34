"""The internals of pyiceberg that the commit path stands on, and the traps it goes around: an upgrade must tell us.

If one of these fails after an upgrade, read lakehouse/commit.py and lakehouse/staging.py again before changing the test.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile, ManifestEntryStatus
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table, Transaction
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import AddSnapshotUpdate, AssertRefSnapshotId, SetPropertiesUpdate, SetSnapshotRefUpdate
from pyiceberg.table.update.snapshot import _MergeAppendFiles, _OverwriteFiles
from pyiceberg.transforms import DayTransform
from pyiceberg.types import LongType, NestedField, TimestamptzType

from lakehouse.declarations import Build, Declaration
from lakehouse.errors import Replan
from lakehouse.lake import TABLE_PROPERTIES
from lakehouse.live import files_where
from lakehouse.predicates import at_least, equal, one_of
from lakehouse.snapshots import OneSnapshot
from lakehouse.staging import stage

SCHEMA = Schema(NestedField(1, "offset", LongType(), required=False), NestedField(2, "at", TimestamptzType(), required=False))
SPEC = PartitionSpec(PartitionField(2, 1000, DayTransform(), "at_day"))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = load_catalog("lake", type="sql", uri=f"sqlite:///{tmp_path / 'c.db'}", warehouse=f"file://{tmp_path / 'w'}")
    catalog.create_namespace("a")
    return catalog


@pytest.fixture
def table(catalog: Catalog) -> Table:
    return catalog.create_table("a.b", SCHEMA, partition_spec=SPEC, properties=TABLE_PROPERTIES)


def rows(*offsets: int) -> pa.Table:
    at = [datetime(2026, 3, 1, tzinfo=UTC)] * len(offsets)
    return pa.table({"offset": pa.array(offsets, pa.int64()), "at": pa.array(at, pa.timestamp("us", "UTC"))})


DECLARED = Declaration("a.b", "test", "tests", "a row", ["offset"], Build("append"), [])


def staged(table: Table, *offsets: int) -> list[DataFile]:
    return stage(table, DECLARED, rows(*offsets))


def test_the_version_these_were_found_in() -> None:
    assert version("pyiceberg") == "0.12.0"


def test_a_file_that_is_written_does_not_know_its_spec_until_told() -> None:
    file = DataFile.from_args(spec_id=2)
    assert getattr(file, "_spec_id", None) is None
    file.spec_id = 3
    assert file.spec_id == 3


def test_a_partition_is_the_same_record_before_and_after_a_commit(table: Table) -> None:
    """The scope of a rewrite compares partitions of files just written with partitions read from manifests."""
    (file,) = staged(table, 1)
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        append.append_data_file(file)
    (read,) = [task.file for task in table.refresh().scan().plan_files()]
    assert (read.partition, read.spec_id) == (file.partition, file.spec_id)
    assert hash(read.partition) == hash(file.partition)
    assert read == file  # files to remove are found by equality


def test_a_snapshot_can_be_built_without_being_sent(table: Table) -> None:
    transaction = table.transaction()
    producer = transaction.update_snapshot(snapshot_properties={"k": "v"}).merge_append()
    for file in staged(table, 1):
        producer.append_data_file(file)
    producer.commit()
    transaction.set_properties({"p": "1"})
    assert [type(u) for u in transaction._updates] == [AddSnapshotUpdate, SetSnapshotRefUpdate, SetPropertiesUpdate]
    added = transaction._updates[0]
    assert isinstance(added, AddSnapshotUpdate)
    assert added.snapshot.snapshot_id == producer.snapshot_id
    assert added.snapshot.sequence_number == table.metadata.next_sequence_number() == 1
    (requirement,) = transaction._requirements
    assert requirement == AssertRefSnapshotId(ref="main", snapshot_id=None)
    assert table.refresh().snapshots() == []
    table._do_commit(updates=transaction._updates, requirements=transaction._requirements)
    current = table.current_snapshot()
    assert current is not None
    assert current.snapshot_id == producer.snapshot_id
    assert table.refresh().properties["p"] == "1"


def test_the_compare_and_swap_is_on_the_snapshot_of_main(catalog: Catalog, table: Table) -> None:
    transaction = table.transaction()
    producer = transaction.update_snapshot().merge_append()
    producer.append_data_file(staged(table, 1)[0])
    producer.commit()
    catalog.load_table("a.b").append(rows(2))
    with pytest.raises(CommitFailedException, match="main"):
        table._do_commit(updates=transaction._updates, requirements=transaction._requirements)
    assert sorted(catalog.load_table("a.b").scan().to_arrow()["offset"].to_pylist()) == [2]


def test_an_overwrite_lists_what_it_added_and_removed_under_its_own_id(table: Table) -> None:
    table.append(rows(1))
    (old,) = [task.file for task in table.scan().plan_files()]
    transaction = table.transaction()
    producer = transaction.update_snapshot().overwrite()
    producer.append_data_file(staged(table, 7)[0])
    producer.delete_data_file(old)
    producer.commit()
    table._do_commit(updates=transaction._updates, requirements=transaction._requirements)
    snapshot = table.current_snapshot()
    assert snapshot is not None
    own = [m for m in snapshot.manifests(table.io) if m.added_snapshot_id == snapshot.snapshot_id]
    entries = [e for m in own for e in m.fetch_manifest_entry(table.io, discard_deleted=False)]
    assert {e.snapshot_id for e in entries} == {snapshot.snapshot_id}
    assert sorted((e.status, e.data_file.file_path == old.file_path) for e in entries) == [
        (ManifestEntryStatus.ADDED, False),
        (ManifestEntryStatus.DELETED, True),
    ]


def test_an_overwrite_can_be_given_the_merging_of_an_append() -> None:
    """lakehouse.snapshots.Overwrite takes one method of each, by the order of its bases."""
    assert "_process_manifests" not in vars(_OverwriteFiles)
    assert {"_existing_manifests", "_deleted_entries"} <= vars(_OverwriteFiles).keys()
    assert {"__init__", "_process_manifests"} <= vars(_MergeAppendFiles).keys()


def test_the_trap_an_overwrite_carries_manifests_of_removed_files_along(table: Table) -> None:
    for i in range(4):
        transaction = table.transaction()
        producer = transaction.update_snapshot().overwrite()
        for task in table.scan().plan_files():
            producer.delete_data_file(task.file)
        producer.append_data_file(staged(table, i)[0])
        producer.commit()
        table._do_commit(updates=transaction._updates, requirements=transaction._requirements)
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert len(snapshot.manifests(table.io)) == 4  # one file is live


def test_files_are_found_as_by_the_library(table: Table) -> None:
    """lakehouse.live takes the library's planner and leaves out what only its reader needs."""
    for i in range(3):
        table.append(rows(10 * i, 10 * i + 1))
    before = table.current_snapshot()
    assert before is not None
    table.append(rows(40))
    for where, count in ((equal("offset", 11), 1), (at_least("offset", 10), 3), (one_of("offset", []), 0)):
        found = [f.file_path for f in files_where(table, where)]
        assert found == [t.file.file_path for t in table.scan(where).plan_files()]
        assert len(found) == count
    assert len(files_where(table)) == 4
    assert len(files_where(table, snapshot_id=before.snapshot_id)) == 3
    assert files_where(table, snapshot_id=None) == []
    with pytest.raises(Replan, match="has expired"):
        files_where(table, snapshot_id=7)


def test_the_trap_a_transaction_copies_all_metadata_each_time_it_is_asked(table: Table) -> None:
    """Why the commit path has a transaction of its own, which copies none while nothing is staged."""
    library, ours = Transaction(table), OneSnapshot(table)
    assert library.table_metadata is not library.table_metadata
    assert ours.table_metadata is table.metadata
    producer = _MergeAppendFiles(Operation.APPEND, ours, table.io)
    producer.append_data_file(staged(table, 1)[0])
    producer.commit()
    assert [s.snapshot_id for s in ours.table_metadata.snapshots] == [producer.snapshot_id]
    assert table.metadata.snapshots == []


def test_a_ref_can_be_set_together_with_properties(table: Table) -> None:
    table.append(rows(1))
    target = table.current_snapshot()
    assert target is not None
    table.append(rows(2))
    transaction = table.transaction()
    transaction.set_properties({"p": "1"})
    updates, requirements = transaction._set_ref_snapshot(target.snapshot_id, "main", "branch")
    assert [type(r) for r in requirements] == [AssertRefSnapshotId]
    table._do_commit(updates=(*transaction._updates, *updates), requirements=requirements)
    back = table.refresh().current_snapshot()
    assert back is not None
    assert (back.snapshot_id, table.properties["p"]) == (target.snapshot_id, "1")


def test_expiry_takes_the_parent_away_from_the_next_snapshot(table: Table) -> None:
    """So a history cut short by expiry looks like a whole one: nothing may conclude from a missing parent."""
    for i in range(3):
        table.append(rows(i))
    first, second, _ = table.snapshots()
    table.maintenance.expire_snapshots().by_id(first.snapshot_id).commit()
    kept = table.refresh().snapshot_by_id(second.snapshot_id)
    assert kept is not None
    assert (kept.parent_snapshot_id, kept.sequence_number) == (None, 2)


def test_the_trap_pyicebergs_own_retry_lets_a_zombies_append_through(catalog: Catalog) -> None:
    """Two writers read position 0 and append offsets 0 to 2; the library rebases the second one, and all are there twice."""
    catalog.create_table("a.trap", SCHEMA)  # with the library's own default of 4 retries

    def append_with_position(table: Table) -> None:
        with table.transaction() as transaction:
            transaction.append(rows(0, 1, 2))
            transaction.set_properties({"position": "3"})

    writer, zombie = catalog.load_table("a.trap"), catalog.load_table("a.trap")
    append_with_position(writer)
    append_with_position(zombie)
    assert sorted(catalog.load_table("a.trap").scan().to_arrow()["offset"].to_pylist()) == [0, 0, 1, 1, 2, 2]


def test_our_tables_switch_that_retry_off(catalog: Catalog, table: Table) -> None:
    zombie = catalog.load_table("a.b")
    table.append(rows(0))
    with pytest.raises(CommitFailedException):
        zombie.append(rows(0))


def test_the_trap_a_conflict_deletes_manifests_even_if_it_was_a_yes(catalog: Catalog, table: Table) -> None:
    """Why `commit_transaction` is not used: a conflict that botocore made of a lost answer costs the live manifests."""
    real = catalog.commit_table

    def conflict_with_itself(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        raise CommitFailedException("concurrent modification")

    catalog.commit_table = conflict_with_itself  # type: ignore[method-assign, assignment]
    with pytest.raises(CommitFailedException):
        table.append(rows(0))
    catalog.commit_table = real  # type: ignore[method-assign]
    with pytest.raises(FileNotFoundError):
        catalog.load_table("a.b").scan().to_arrow()
