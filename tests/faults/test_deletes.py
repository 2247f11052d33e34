"""Position deletes: every reader sees the rows that are left, and nobody brings a deleted row back."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from pyiceberg.manifest import DataFile, DataFileContent, ManifestContent
from pyiceberg.table import Table
from records import THINGS, TOPIC, Wire, first, lost_after, rewrite, rewrite_change, stored, things

from lakehouse.changes import changed_rows_sql
from lakehouse.commit import Change, Committed, commit
from lakehouse.content import content_at
from lakehouse.declarations import KeepSnapshots
from lakehouse.deletes import write_deletes
from lakehouse.errors import Replan, Terminal
from lakehouse.lake import Lake
from lakehouse.live import LiveFile, files_where, rows_left
from lakehouse.maintenance.compact import merge_files
from lakehouse.maintenance.expire import expire, remove_expired_files
from lakehouse.maintenance.orphans import remove_orphans
from lakehouse.queries import connect, fetch, files_sql, query
from lakehouse.rollback import rollback_table

SQLITE = pytest.mark.parametrize("kind", ["sqlite"], indirect=True)  # the catalog makes no difference
NEWEST = KeepSnapshots(1, 1, 0)


def fill(lake: Lake, *amounts: int, **more: Any) -> None:
    """Add one file with a row for each amount, in that order."""
    rewrite(lake, things(*({"amount": a} for a in amounts)), **({"scope": frozenset()} | more))


def planned_deletes(lake: Lake, table: Table, *amounts: int) -> Change:
    """A change that deletes the rows of these amounts from the table as loaded, by position."""
    found: dict[LiveFile, list[int]] = {}
    replaced: list[DataFile] = []
    with connect(lake.settings) as connection:
        for file in files_where(table):
            rows = fetch(connection, f"SELECT amount, file_row_number AS n FROM {files_sql(table, [file], numbered=True)}")
            gone = [r["n"] for r in rows.to_pylist() if r["amount"] in amounts]
            if gone:
                before = {n for d in file.deletes for n in deleted(table, d)}
                found[file] = sorted({*gone, *before})
                replaced += file.deletes
    files = write_deletes(table, {f: pl.Series(places, dtype=pl.Int64) for f, places in found.items()})
    base = table.current_snapshot()
    assert base is not None
    return Change(THINGS, {}, {}, add=files, remove=replaced, rewrite=True, base=base.snapshot_id)


def deleted(table: Table, file: DataFile) -> list[int]:
    with table.io.new_input(file.file_path).open() as stream:
        return pl.read_parquet(stream.read())["pos"].to_list()  # type: ignore[no-any-return]


def delete(lake: Lake, *amounts: int) -> Committed:
    table = lake.open_for_write(THINGS)
    return commit(table, lake.run, planned_deletes(lake, table, *amounts))


def amounts(rows: Any) -> list[int]:
    return sorted(rows["amount"].to_pylist())


def left(lake: Lake) -> list[int]:
    """The amounts of the table, which three readers of Iceberg and our own agree on."""
    table = lake.load(THINGS)
    ours = amounts(query(lake, f"SELECT amount FROM {THINGS}"))  # DuckDB's iceberg extension
    with connect(lake.settings) as connection:
        files = files_where(table)
        by_files = amounts(fetch(connection, f"SELECT amount FROM {files_sql(table, files)}")) if files else []
        assert content_at(connection, table, table.current_snapshot().snapshot_id).rows == len(ours)  # type: ignore[union-attr]
    assert by_files == ours == amounts(table.scan().to_arrow())
    assert rows_left(files) == len(ours)
    return ours


def delete_files(table: Table) -> list[DataFile]:
    """The live delete files, found without the code under test."""
    current = table.current_snapshot()
    assert current is not None
    manifests = [m for m in current.manifests(table.io) if m.content == ManifestContent.DELETES]
    return [e.data_file for m in manifests for e in m.fetch_manifest_entry(table.io)]


def test_the_rows_that_are_left_are_the_same_for_every_reader(lake: Lake) -> None:
    fill(lake, *range(10))
    fill(lake, *range(10, 13))
    delete(lake, 3, 7, 11)
    assert left(lake) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]
    delete(lake, 0, 9)  # of a file that has deletes already
    assert left(lake) == [1, 2, 4, 5, 6, 8, 10, 12]
    table = lake.load(THINGS)
    assert [f.record_count for f in sorted(delete_files(table), key=lambda f: f.record_count)] == [1, 4]  # one for each data file
    assert {f.content for f in delete_files(table)} == {DataFileContent.POSITION_DELETES}
    summary = table.current_snapshot().summary.additional_properties  # type: ignore[union-attr]
    assert (summary["total-records"], summary["total-position-deletes"], summary["total-delete-files"]) == ("13", "5", "2")
    fill(lake, 20)  # an append carries them along
    assert left(lake) == [1, 2, 4, 5, 6, 8, 10, 12, 20]


@SQLITE
def test_polars_sees_them_too(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARS_ICEBERG_PLANNER", "pyiceberg")  # it warns that another one is not installed
    fill(lake, *range(10))
    delete(lake, 3, 7)
    rows = pl.scan_iceberg(lake.load(THINGS)).select("amount").collect()
    assert sorted(rows["amount"]) == [0, 1, 2, 4, 5, 6, 8, 9]


@SQLITE
def test_a_filter_finds_the_rows_left_at_their_positions(lake: Lake) -> None:
    fill(lake, *range(10))
    delete(lake, 3)
    table = lake.load(THINGS)
    with connect(lake.settings) as connection:
        rows = files_sql(table, files_where(table), numbered=True)
        found = fetch(connection, f"SELECT amount, file_row_number AS n FROM {rows} WHERE amount IN (3, 4)").to_pylist()
    assert found == [{"amount": 4, "n": 4}]


@SQLITE
def test_many_commits_keep_one_delete_manifest_and_merge_only_data(lake: Lake) -> None:
    for i in range(24):
        fill(lake, *range(5 * i, 5 * i + 5))
        delete(lake, 5 * i + 1)
    table = lake.load(THINGS)
    manifests = table.current_snapshot().manifests(table.io)  # type: ignore[union-attr]
    assert [m.content for m in manifests].count(ManifestContent.DELETES) == 1
    assert len(manifests) < 24
    assert left(lake) == [i for i in range(120) if i % 5 != 1]


def test_a_rewrite_takes_the_deletes_of_its_files_along(lake: Lake) -> None:
    fill(lake, *range(5))
    delete(lake, 1)
    table = lake.load(THINGS)
    rewrite(lake, things({"amount": 9}), remove=files_where(table))
    assert left(lake) == [9]
    assert delete_files(lake.load(THINGS)) == []
    fill(lake, 10)
    assert left(lake) == [9, 10]


def compacted(lake: Lake, table: Table) -> Change:
    """A compaction of all files of the table as loaded: it asks only that they are live."""
    files = files_where(table)
    added = merge_files(lake, lake.declaration(THINGS), table, files)
    return Change(THINGS, {}, {}, add=added, remove=files, rewrite=True, scope=frozenset(), note={"kind": "compact"})


def test_a_compaction_leaves_out_what_is_deleted(lake: Lake) -> None:
    fill(lake, *range(5))
    fill(lake, *range(5, 8))
    delete(lake, 1, 6)
    table = lake.load(THINGS)
    commit(table, lake.run, compacted(lake, table))
    assert left(lake) == [0, 2, 3, 4, 5, 7]
    assert len(files_where(lake.load(THINGS))) == 1
    assert delete_files(lake.load(THINGS)) == []


@SQLITE
@pytest.mark.parametrize("before", [(), (0,)])
def test_a_compaction_planned_before_a_delete_does_not_bring_the_row_back(
    lake: Lake, other: Lake, wire: Wire, before: tuple[int, ...]
) -> None:
    fill(lake, *range(5))
    if before:
        delete(lake, *before)
    table = lake.open_for_write(THINGS)
    change = compacted(lake, table)
    wire.faults = [first(lambda: delete(other, 1))]
    with pytest.raises(Replan, match="deleted meanwhile"):
        commit(table, lake.run, change)
    assert left(lake) == [i for i in range(5) if i not in (1, *before)]


@SQLITE
def test_deletes_planned_before_a_compaction_are_planned_again(lake: Lake, other: Lake) -> None:
    fill(lake, *range(5))
    table = other.open_for_write(THINGS)
    change = planned_deletes(other, table, 1)
    compacting = lake.load(THINGS)
    commit(compacting, lake.run, compacted(lake, compacting))
    with pytest.raises(Replan, match="replaced meanwhile"):
        commit(table, other.run, change)
    assert left(lake) == [0, 1, 2, 3, 4]
    delete(other, 1)
    assert left(lake) == [0, 2, 3, 4]


@SQLITE
def test_two_that_delete_from_one_file_do_not_undo_each_other(lake: Lake, other: Lake, wire: Wire) -> None:
    fill(lake, *range(5))
    for known, more in ((1, 2), (3, 4)):  # without, and with, a delete file that both would replace
        table = lake.open_for_write(THINGS)
        change = planned_deletes(lake, table, known)
        wire.faults = [first(lambda gone=more: delete(other, gone))]
        with pytest.raises(Replan):
            commit(table, lake.run, change)
        delete(lake, known)
    assert left(lake) == [0]


@SQLITE
def test_a_rewrite_that_does_not_know_the_deletes_is_refused(lake: Lake) -> None:
    fill(lake, *range(5))
    stale = lake.open_for_write(THINGS)
    change = rewrite_change(stale, lake, things({"amount": 9}), remove=files_where(stale))
    delete(lake, 1)
    with pytest.raises(Replan):
        commit(stale, lake.run, change)
    assert left(lake) == [0, 2, 3, 4]


def test_a_lost_answer_is_a_yes(lake: Lake, wire: Wire) -> None:
    fill(lake, *range(5))
    wire.faults = [lost_after]
    assert delete(lake, 2).unknown_outcomes == 1
    assert left(lake) == [0, 1, 3, 4]


@SQLITE
def test_what_changed_between_two_snapshots_are_the_rows_deleted_and_added(lake: Lake) -> None:
    fill(lake, *range(5))
    fill(lake, *range(5, 8))
    snapshots = [lake.load(THINGS).current_snapshot().snapshot_id]  # type: ignore[union-attr]
    for step in (lambda: delete(lake, 1), lambda: delete(lake, 2, 6), lambda: fill(lake, 9)):
        step()
        snapshots.append(lake.load(THINGS).current_snapshot().snapshot_id)  # type: ignore[union-attr]
    table = lake.load(THINGS)
    compacting = lake.load(THINGS)
    commit(compacting, lake.run, compacted(lake, compacting))
    table.refresh()
    snapshots.append(table.current_snapshot().snapshot_id)  # type: ignore[union-attr]

    def changed(before: int | None, after: int | None) -> list[int] | None:
        sql = changed_rows_sql(table, before, after, ["amount"])
        with connect(lake.settings) as connection:
            return None if sql is None else amounts(fetch(connection, f"FROM {sql}"))

    held = [[*range(8)], [0, 2, 3, 4, 5, 6, 7], [0, 3, 4, 5, 7], [0, 3, 4, 5, 7, 9], [0, 3, 4, 5, 7, 9]]
    for i, a in enumerate(snapshots):
        for j, b in enumerate(snapshots):
            differ = sorted(set(held[i]) ^ set(held[j]))
            assert (changed(a, b) or []) == differ, (i, j)
    assert changed(snapshots[0], snapshots[0]) is None
    assert changed(None, snapshots[1]) == held[1]


def test_expiry_and_orphan_removal_keep_delete_files_as_long_as_a_snapshot_needs_them(lake: Lake) -> None:
    fill(lake, *range(5))
    delete(lake, 1)
    needed = lake.load(THINGS).current_snapshot().snapshot_id  # type: ignore[union-attr]
    delete(lake, 2)
    table = lake.load(THINGS)
    commit(table, lake.run, compacted(lake, table))
    in_years = int(1e14)
    remove_orphans(lake.load(THINGS), lake.run, lake.settings, 0, in_years)
    assert amounts(lake.load(THINGS).scan(snapshot_id=needed).to_arrow()) == [0, 2, 3, 4]
    expire(lake.load(THINGS), lake.run, NEWEST, (needed,))
    remove_expired_files(lake.load(THINGS), 0)
    assert amounts(lake.load(THINGS).scan(snapshot_id=needed).to_arrow()) == [0, 2, 3, 4]
    assert len([p for p in stored(lake) if p.endswith("-deletes.parquet")]) == 1
    expire(lake.load(THINGS), lake.run, NEWEST, (), in_years)
    remove_orphans(lake.load(THINGS), lake.run, lake.settings, 0, in_years)  # as with a tag, what that snapshot alone named
    assert [p for p in stored(lake) if p.endswith("-deletes.parquet")] == []
    assert left(lake) == [0, 3, 4]
    assert remove_orphans(lake.load(THINGS), lake.run, lake.settings, 0, in_years)[0] == 0


@SQLITE
def test_a_rollback_brings_the_rows_back(lake: Lake) -> None:
    fill(lake, *range(5), expected={(TOPIC, 0): 0}, reached={(TOPIC, 0): 1})
    before = lake.load(THINGS).current_snapshot().snapshot_id  # type: ignore[union-attr]
    delete(lake, 1)
    rollback_table(lake, THINGS, before)
    assert left(lake) == [0, 1, 2, 3, 4]
    delete(lake, 4)
    assert left(lake) == [0, 1, 2, 3]


@SQLITE
@pytest.mark.parametrize("unknown", ["by_value", "of_several_files"])
def test_deletes_of_another_kind_are_refused_rather_than_ignored(lake: Lake, unknown: str) -> None:
    """Another engine may write them; to read the data files alone would show rows that are gone."""
    fill(lake, *range(5))
    table = lake.open_for_write(THINGS)
    change = planned_deletes(lake, table, 1)
    (file,) = change.add
    if unknown == "by_value":
        file[0], file[14] = DataFileContent.EQUALITY_DELETES, [1]
    else:
        file[11] = {k: v + b"z" for k, v in file.upper_bounds.items()}
    commit(table, lake.run, change)
    with pytest.raises(Terminal, match="delete files of another engine"):
        files_where(lake.load(THINGS))
