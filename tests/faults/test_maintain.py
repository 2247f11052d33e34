"""Maintenance beside writers: nothing that a kept snapshot or a commit under way needs goes; what nobody needs does."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from prometheus_client import REGISTRY
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.table import Table
from records import (
    DAY,
    RAW,
    THINGS,
    TOPIC,
    Wire,
    append,
    append_change,
    first,
    live_files,
    lost_after,
    lost_before,
    offsets,
    position,
    records,
    rewrite,
    stored,
    things,
)

from lakehouse.commit import Change, commit
from lakehouse.dead_letters import write_dead_letters
from lakehouse.declarations import KeepSnapshots
from lakehouse.errors import CommitUnresolved, Replan, Retryable, RolledBack, Terminal, UsageError
from lakehouse.lake import Lake, history
from lakehouse.maintenance import expire as expiry
from lakehouse.maintenance.expire import EXPIRED, expire, remove_expired_files, to_expire
from lakehouse.maintenance.manifests import rewrite_manifests
from lakehouse.maintenance.orphans import remove_orphans
from lakehouse.maintenance.retention import drop_outdated, end_of
from lakehouse.maintenance.run import maintain
from lakehouse.maintenance.tags import remove_tag, tag_snapshot
from lakehouse.positions import read_positions
from lakehouse.rollback import rollback_table
from lakehouse.snapshots import SMALL_MANIFEST_FILES
from lakehouse.staging import stage

NEWEST = KeepSnapshots(1, 1, 0)
SQLITE = pytest.mark.parametrize("kind", ["sqlite"], indirect=True)  # the catalog makes no difference
HOUR = 3_600_000


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lakehouse.publish.FIRST_WAIT_SECONDS", 0.0)


def named(table: Table) -> set[str]:
    """Every file that a kept snapshot names, found without the code under test."""
    paths = {table.metadata_location}
    for snapshot in table.snapshots():
        paths.add(snapshot.manifest_list)
        for manifest in snapshot.manifests(table.io):
            paths.add(manifest.manifest_path)
            paths |= {e.data_file.file_path for e in manifest.fetch_manifest_entry(table.io)}
    return paths


def whole(lake: Lake, name: str) -> None:
    """Every file of every kept snapshot is there, and each can be read."""
    table = lake.load(name)
    assert named(table) - stored(lake, "") == set()
    for snapshot in table.snapshots():
        table.scan(snapshot_id=snapshot.snapshot_id).to_arrow()


def data_files(lake: Lake) -> set[str]:
    """The Parquet files in the store, without the records of expired files."""
    return {p for p in stored(lake) if "/data/expired/" not in p}


def ids(table: Table) -> list[int]:
    return [s.snapshot_id for s in sorted(table.snapshots(), key=lambda s: s.sequence_number or 0)]


def replace_all(lake: Lake, **row: Any) -> None:
    """Rewrite the one file of billing.things."""
    rewrite(lake, things(row), live_files(lake.load(THINGS)) if lake.exists(THINGS) else ())


def moment() -> int:
    """A time (ms) that every file written before is older than, and every file written after younger; S3 knows seconds."""
    time.sleep(1.1)
    now = int(time.time() * 1000)
    time.sleep(1.1)
    return now


def in_an_hour() -> int:
    return int(time.time() * 1000) + HOUR


# --- expiry ------------------------------------------------------------------------------------------------------------


@SQLITE
def test_the_policy_keeps_the_newest_and_the_young_up_to_a_number(lake: Lake) -> None:
    for i in range(8):
        append(lake, 0, i, i + 1)
    metadata = lake.load(RAW).metadata
    now = max(s.timestamp_ms for s in metadata.snapshots)

    def left(at_least: int, at_most: int, days: float, later_ms: int = 0) -> int:
        return 8 - len(to_expire(metadata, KeepSnapshots(at_least, at_most, days), (), now + later_ms))

    assert left(3, 3, 1) == 3
    assert left(3, 6, 1) == 6
    assert left(3, 20, 1) == 8
    assert left(3, 20, 1, later_ms=25 * HOUR) == 3
    assert left(3, 6, 0, later_ms=HOUR) == 3
    expired = to_expire(metadata, NEWEST, {metadata.snapshots[2].snapshot_id}, now)
    assert [s.sequence_number for s in expired] == [1, 2, 4, 5, 6, 7]


def test_expired_snapshots_go_at_once_and_their_files_later(lake: Lake) -> None:
    for amount in range(1, 6):
        replace_all(lake, amount=amount)
    table = lake.load(THINGS)
    before = data_files(lake)
    planned = expire(table, lake.run, NEWEST, ())
    assert (len(planned.snapshots), len(planned.data), len(planned.lists)) == (4, 4, 4)
    assert data_files(lake) == before  # a reader that has loaded the table before goes on
    assert len(lake.load(THINGS).snapshots()) == 1
    assert json.loads(table.properties[EXPIRED])["snapshots"] == 4
    assert remove_expired_files(table, HOUR) == 0
    assert remove_expired_files(table, HOUR, dry_run=True, now_ms=10**14) == len(planned.files)
    assert remove_expired_files(table, 0) == len(planned.files)
    assert {f.file_path for f in live_files(table)} == data_files(lake)
    assert remove_expired_files(table, 0) == 0
    whole(lake, THINGS)
    # nothing is left for orphan removal
    assert {p for p in stored(lake, ".avro") if "/things/" in p} == {p for p in named(lake.load(THINGS)) if p.endswith(".avro")}


@SQLITE
def test_appended_files_stay_whatever_expires(lake: Lake) -> None:
    for i in range(45):  # manifests are merged twice meanwhile
        append(lake, 0, i, i + 1)
    table = lake.load(RAW)
    expire(table, lake.run, KeepSnapshots(3, 3, 0), ())
    assert remove_expired_files(table, 0) > 42
    whole(lake, RAW)
    assert offsets(lake) == list(range(45))
    assert len(data_files(lake)) == 45
    append(lake, 0, 45, 46)
    assert position(lake) == 46


def test_a_tagged_snapshot_and_its_files_stay_until_the_tag_goes(lake: Lake) -> None:
    replace_all(lake, amount=1)
    pinned = tag_snapshot(lake, THINGS, "audit-2026-03")
    assert tag_snapshot(lake, THINGS, "audit-2026-03", pinned) == pinned
    for amount in (2, 3, 4):
        replace_all(lake, amount=amount)
    expire(lake.load(THINGS), lake.run, NEWEST, ())
    remove_expired_files(lake.load(THINGS), 0)
    table = lake.load(THINGS)
    assert ids(table) == [pinned, ids(table)[-1]]
    whole(lake, THINGS)
    assert table.scan(snapshot_id=pinned).to_arrow()["amount"].to_pylist() == [1]
    assert len(data_files(lake)) == 2
    remove_tag(lake, THINGS, "audit-2026-03")
    expire(lake.load(THINGS), lake.run, NEWEST, (), now_ms=int(datetime.now(UTC).timestamp() * 1000) + 4 * 24 * HOUR)
    assert pinned not in ids(lake.load(THINGS))
    remove_orphans(lake.load(THINGS), lake.run, lake.settings, 0, in_an_hour())  # what only the tag kept is found by listing
    assert len(data_files(lake)) == 1
    whole(lake, THINGS)


@SQLITE
def test_what_a_branch_holds_stays(lake: Lake) -> None:
    replace_all(lake, amount=1)
    table = lake.load(THINGS)
    table.manage_snapshots().create_branch(ids(table)[0], "draft").commit()
    table.append(things({"thing_id": "draft"}).cast(schema_to_pyarrow(table.schema(), include_field_ids=False)), branch="draft")
    for amount in (2, 3):
        replace_all(lake, amount=amount)
    expire(lake.load(THINGS), lake.run, NEWEST, ())
    remove_expired_files(lake.load(THINGS), 0)
    table = lake.load(THINGS)
    assert set(table.metadata.refs) == {"main", "draft"}
    whole(lake, THINGS)
    draft = table.metadata.refs["draft"].snapshot_id
    assert sorted(table.scan(snapshot_id=draft).to_arrow()["thing_id"].to_pylist()) == ["draft", "t1"]


def test_a_tag_set_while_expiry_is_under_way_is_kept(lake: Lake, other: Lake, wire: Wire) -> None:
    """Iceberg would let the expiry take the tag along: what moves `main` excludes the two."""
    for amount in (1, 2, 3):
        replace_all(lake, amount=amount)
    oldest = ids(lake.load(THINGS))[0]
    wire.faults = [first(lambda: tag_snapshot(other, THINGS, "late", oldest))]
    expire(lake.load(THINGS), lake.run, NEWEST, ())
    remove_expired_files(lake.load(THINGS), 0)
    table = lake.load(THINGS)
    assert table.metadata.refs["late"].snapshot_id == oldest
    whole(lake, THINGS)


@SQLITE
def test_an_expired_snapshot_cannot_be_tagged(lake: Lake, other: Lake, wire: Wire) -> None:
    for amount in (1, 2, 3):
        replace_all(lake, amount=amount)
    oldest = ids(lake.load(THINGS))[0]
    wire.faults = [first(lambda: expire(other.load(THINGS), other.run, NEWEST, ()))]
    # an expiry does not move main: here it is the catalog that knows no such snapshot
    with pytest.raises(UsageError, match="has no snapshot"):
        tag_snapshot(lake, THINGS, "late", oldest)
    assert "late" not in lake.load(THINGS).metadata.refs


@pytest.mark.parametrize("fault", [lost_before, lost_after])
def test_an_answer_lost_to_expiry_is_looked_up(lake: Lake, wire: Wire, fault: Any) -> None:
    for amount in range(1, 5):
        replace_all(lake, amount=amount)
    wire.faults = [fault]
    planned = expire(lake.load(THINGS), lake.run, NEWEST, ())
    assert len(planned.snapshots) == 3
    table = lake.load(THINGS)
    assert (len(table.snapshots()), remove_expired_files(table, 0)) == (1, len(planned.files))
    whole(lake, THINGS)


@SQLITE
def test_commits_that_always_come_first_leave_expiry_for_later(lake: Lake, other: Lake, wire: Wire) -> None:
    for i in range(3):
        append(lake, 0, i, i + 1)
    wire.faults = [first(lambda i=i: append(other, 0, i, i + 1)) for i in range(3, 3 + expiry.MAX_ATTEMPTS)]
    with pytest.raises(CommitUnresolved, match=f"{expiry.MAX_ATTEMPTS} conflicts"):
        expire(lake.load(RAW), lake.run, NEWEST, ())
    assert len(lake.load(RAW).snapshots()) == 3 + expiry.MAX_ATTEMPTS
    assert remove_expired_files(lake.load(RAW), 0) == 0  # records of attempts that did not land count for nothing
    expire(lake.load(RAW), lake.run, NEWEST, ())
    remove_expired_files(lake.load(RAW), 0)
    whole(lake, RAW)
    assert offsets(lake) == list(range(13))


def test_a_record_whose_expiry_never_landed_is_never_acted_upon(lake: Lake, wire: Wire) -> None:
    """The table is rolled back to a snapshot that was about to expire: files that were garbage then are live again."""
    replace_all(lake, amount=1)
    replace_all(lake, amount=2)
    table = lake.load(THINGS)
    goal = ids(table)[0]
    wire.faults = [lost_before] * expiry.MAX_ATTEMPTS
    with pytest.raises(CommitUnresolved, match=f"{expiry.MAX_ATTEMPTS} unknown outcomes"):
        expire(table, lake.run, NEWEST, ())
    lake.load(THINGS).manage_snapshots().set_current_snapshot(goal).commit()
    later = int(datetime.now(UTC).timestamp() * 1000) + 30 * 24 * HOUR
    expire(lake.load(THINGS), lake.run, NEWEST, (), now_ms=later)  # what was rolled back is old by now and goes
    assert ids(lake.load(THINGS)) == [goal]
    remove_expired_files(lake.load(THINGS), 0, now_ms=later)
    whole(lake, THINGS)
    assert lake.load(THINGS).scan().to_arrow()["amount"].to_pylist() == [1]


@SQLITE
def test_a_table_rolled_back_by_hand_is_not_expired(lake: Lake) -> None:
    """Expiry would cut off the history in which the rollback shows."""
    for i in range(4):
        append(lake, 0, i, i + 1)
    table = lake.load(RAW)
    table.manage_snapshots().set_current_snapshot(ids(table)[1]).commit()
    with pytest.raises(RolledBack):
        expire(lake.load(RAW), lake.run, NEWEST, ())
    (report,) = maintain(lake, [RAW], ["expire"])
    assert "lakehouse rollback" in (report.problem or "")
    rollback_table(lake, RAW, ids(lake.load(RAW))[1])
    expire(lake.load(RAW), lake.run, NEWEST, ())
    append(lake, 0, 2, 3)
    assert offsets(lake) == [0, 1, 2]


@SQLITE
def test_a_rolled_back_snapshot_stays_for_the_writer_that_lost_its_answer(lake: Lake) -> None:
    append(lake, 0, 0, 2)
    goal = ids(lake.load(RAW))[0]
    append(lake, 0, 2, 4)
    abandoned = ids(lake.load(RAW))[1]
    rollback_table(lake, RAW, goal)
    append(lake, 0, 2, 3)
    expire(lake.load(RAW), lake.run, NEWEST, ())
    assert abandoned in ids(lake.load(RAW))
    later = int(datetime.now(UTC).timestamp() * 1000) + 4 * 24 * HOUR
    expire(lake.load(RAW), lake.run, NEWEST, (), now_ms=later)
    remove_expired_files(lake.load(RAW), 0, now_ms=later)
    assert abandoned not in ids(lake.load(RAW))
    whole(lake, RAW)
    assert offsets(lake) == [0, 1, 2]


@SQLITE
def test_a_writer_that_slept_through_expiry_is_fenced(lake: Lake, other: Lake) -> None:
    from lakehouse.errors import Fenced

    append(lake, 0, 0, 2)
    zombie = other.open_for_write(RAW)
    change = append_change(other, zombie, 0, 2, 4)
    for i in range(2, 6):
        append(lake, 0, i, i + 1)
    expire(lake.load(RAW), lake.run, NEWEST, ())
    with pytest.raises(Fenced):
        commit(zombie, other.run, change)
    assert offsets(lake) == list(range(6))


# --- manifests ---------------------------------------------------------------------------------------------------------


def manifests(lake: Lake, name: str = RAW) -> list[Any]:
    table = lake.load(name)
    current = table.current_snapshot()
    assert current is not None
    return list(current.manifests(table.io))


def test_manifests_are_few_and_ordered_by_partition_and_no_file_is_lost(lake: Lake, other: Lake, wire: Wire) -> None:
    for i in range(12):
        append(lake, i, 0, 1)
    table = lake.load(RAW)
    before = {
        (e.data_file.file_path, e.sequence_number, e.snapshot_id)
        for m in manifests(lake)
        for e in m.fetch_manifest_entry(table.io)
    }
    wire.faults = [first(lambda: append(other, 12, 0, 1)), lost_after]
    assert rewrite_manifests(table, lake.run) == 12
    (one,) = manifests(lake)
    after = {(e.data_file.file_path, e.sequence_number, e.snapshot_id) for e in one.fetch_manifest_entry(table.io)}
    assert len(after) == 13
    assert before < after
    assert rewrite_manifests(lake.load(RAW), lake.run) == 0
    summary = lake.load(RAW).current_snapshot()
    assert summary is not None
    assert summary.summary is not None
    assert summary.summary.additional_properties["lakehouse.kind"] == "manifests"
    assert summary.summary.additional_properties["total-records"] == "13"
    append(lake, 0, 1, 2)
    assert offsets(lake) == [0, 1]


@SQLITE
def test_a_commit_does_not_read_large_manifests(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lakehouse.snapshots.SMALL_MANIFEST_FILES", 30)
    assert SMALL_MANIFEST_FILES == 200
    for i in range(70):
        append(lake, 0, i, i + 1)
    counts = sorted(m.added_files_count + m.existing_files_count for m in manifests(lake))
    assert sum(counts) == 70
    assert counts[-1] < 30 + 20
    assert len(counts) < 25
    assert offsets(lake) == list(range(70))


# --- orphans -----------------------------------------------------------------------------------------------------------


def test_orphans_older_than_the_guard_go_and_nothing_else(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    left = {f.file_path for f in stage(table, lake.declaration(RAW), records(0, 5, 9))}
    stray = next(iter(left)).rpartition("/")[0] + "/stray.parquet"
    with table.io.new_output(stray).create() as stream:
        stream.write(b"x" * 10)
    now = moment()
    young = {f.file_path for f in stage(table, lake.declaration(RAW), records(0, 5, 7))}
    before = len(table.snapshots())
    found = remove_orphans(table, lake.run, lake.settings, 0, now, dry_run=True)
    assert found == (2, 10 + sum(len(table.io.new_input(p)) for p in left))
    assert len(lake.load(RAW).snapshots()) == before
    assert remove_orphans(table, lake.run, lake.settings, 0, now) == found
    assert stored(lake, "") & {*left, stray, *young} == young
    whole(lake, RAW)
    assert remove_orphans(table, lake.run, lake.settings, 0, now) == (0, 0)
    assert remove_orphans(table, lake.run, lake.settings, HOUR) == (0, 0)
    assert len(lake.load(RAW).snapshots()) == before + 1


@SQLITE
def test_what_orphans_took_is_a_metric(lake: Lake) -> None:
    lake = replace(lake, settings=lake.settings.model_copy(update={"orphan_hours": 0}))
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    with table.io.new_output(f"{table.location()}/data/stray.parquet").create() as stream:
        stream.write(b"x" * 10)
    moment()
    (report,) = maintain(lake, [RAW], ["orphans"])
    assert (report.figures, report.problem) == ({"files": 1, "bytes": 10}, None)
    assert REGISTRY.get_sample_value("lakehouse_orphan_bytes", {"table": RAW}) == 10
    list(maintain(lake, [RAW], ["orphans"]))
    assert REGISTRY.get_sample_value("lakehouse_orphan_bytes", {"table": RAW}) == 0


@pytest.mark.parametrize("when", ["before", "during"])
def test_files_of_a_commit_under_way_are_refused_once_they_may_be_taken(lake: Lake, other: Lake, wire: Wire, when: str) -> None:
    """A writer sleeps for longer than the guard between staging and commit, or between our check and the catalog's swap."""
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)

    def sweep() -> None:
        assert remove_orphans(other.load(RAW), other.run, other.settings, 0, in_an_hour())[0] >= 1

    if when == "before":
        sweep()
    else:
        wire.faults = [first(sweep)]
    with pytest.raises(Replan, match="orphan removal"):
        commit(table, lake.run, change)
    whole(lake, RAW)
    append(lake, 0, 5, 9)
    assert offsets(lake) == list(range(9))


def test_files_younger_than_the_guard_are_committed_across_a_sweep(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    stage(lake.load(RAW), lake.declaration(RAW), records(0, 7, 8))
    now = moment()
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)
    wire.faults = [first(lambda: remove_orphans(other.load(RAW), other.run, other.settings, 0, now))]
    assert commit(table, lake.run, change).conflicts == 1
    assert offsets(lake) == list(range(9))
    whole(lake, RAW)


@SQLITE
def test_a_listing_of_another_place_removes_nothing(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    append(lake, 0, 0, 5)
    elsewhere = [("elsewhere/data/a.parquet", 10, 0)]
    monkeypatch.setattr("lakehouse.maintenance.orphans.list_files", lambda *_: elsewhere)
    with pytest.raises(Terminal, match="another place"):
        remove_orphans(lake.load(RAW), lake.run, lake.settings, 0)


# --- retention ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ten_days(lake: Lake, tmp_path: Path) -> Lake:
    """The lake, in which raw.records is kept for ten days and billing.things is built from it."""
    code = tmp_path / "transforms" / "billing" / "things.sql"
    code.parent.mkdir(parents=True)
    code.write_text("SELECT topic AS thing_id FROM raw.records")
    declarations = {**lake.declarations, RAW: msgspec.structs.replace(lake.declaration(RAW), retention_days=10)}
    settings = lake.settings.model_copy(update={"transforms_dir": code.parent.parent})
    return replace(lake, declarations=declarations, settings=settings)


def a_row_a_day(lake: Lake, days: int, *partitions: int) -> None:
    """raw.records: offset i of each partition on day i, in one file a day."""
    table = lake.open_for_write(RAW)
    for i in range(days):
        day = pa.concat_tables([records(p, i, i + 1, DAY + timedelta(days=i)) for p in partitions])
        before, after = ({(TOPIC, p): n for p in partitions} for n in (i, i + 1))
        change = Change(RAW, before, after, add=stage(table, lake.declaration(RAW), day), sources={TOPIC: "cluster/topic-id"})
        commit(table, lake.run, change)


def read_up_to(lake: Lake, *reached: int) -> None:
    """billing.things has read partition 0, 1, ... up to these offsets."""
    rewrite(lake, things({}), expected=lake.vector(THINGS), reached={(TOPIC, p): at for p, at in enumerate(reached)})


@SQLITE
def test_partitions_past_their_retention_are_dropped_whole_and_positions_stay(ten_days: Lake) -> None:
    lake, declared = ten_days, ten_days.declaration(RAW)
    a_row_a_day(lake, 6, 0)
    read_up_to(lake, 6)
    now = DAY + timedelta(days=12, hours=23, minutes=59)  # the third day still has a minute to live
    assert drop_outdated(lake, lake.load(RAW), declared, now) == {"files": 2, "rows": 2, "dead_letters": 0}
    assert offsets(lake) == [2, 3, 4, 5]
    assert position(lake) == 6
    assert drop_outdated(lake, lake.load(RAW), declared, now)["files"] == 0
    assert drop_outdated(lake, lake.load(RAW), declared, now + timedelta(minutes=2))["files"] == 1
    kept = msgspec.structs.replace(declared, retention_days=None)
    assert drop_outdated(lake, lake.load(RAW), kept, now + timedelta(days=900))["files"] == 0
    append(lake, 0, 6, 7)
    assert read_positions(lake.load(RAW).metadata)[RAW][TOPIC, 0].next_offset == 7


@SQLITE
def test_what_a_table_has_not_read_is_not_dropped(ten_days: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, now = ten_days, DAY + timedelta(days=13)  # the first three days are past their retention
    a_row_a_day(lake, 6, 0, 1)
    behind = (
        r"raw\.records: billing\.things has not read what would be dropped: it stands at offset 0 of events\[0\], which goes to 2"
    )
    with pytest.raises(Retryable, match=behind):  # it does not even exist yet
        drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now)
    read_up_to(lake, 6, 2)
    with pytest.raises(Retryable, match=r"stands at offset 2 of events\[1\], which goes to 2.*lakehouse run billing\.things"):
        drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now)
    for dry_run in (True, False):
        (report,) = maintain(lake, [RAW], ["retention"], dry_run=dry_run)
        assert "has not read" in (report.problem or "")
    assert offsets(lake) == list(range(6))
    read_up_to(lake, 6, 3)
    assert drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now) == {"files": 3, "rows": 6, "dead_letters": 0}
    assert (offsets(lake), offsets(lake, 1)) == ([3, 4, 5], [3, 4, 5])


@SQLITE
def test_statistics_say_what_was_read_and_rows_only_where_they_leave_it_open(
    ten_days: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the busy partition 0 the files hold offsets that the quiet partition 1 never had: their rows tell the two apart."""
    lake, now = ten_days, DAY + timedelta(days=13)
    table = lake.open_for_write(RAW)
    rows = pa.concat_tables([records(0, 0, 500), records(1, 0, 3)])
    reached = {(TOPIC, 0): 500, (TOPIC, 1): 3}
    commit(table, lake.run, Change(RAW, {}, reached, add=stage(table, lake.declaration(RAW), rows)))
    read_up_to(lake, 500, 2)
    with pytest.raises(Retryable, match=r"stands at offset 2 of events\[1\], which goes to 2"):
        drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now)
    read_up_to(lake, 500, 3)
    assert drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now)["rows"] == 503
    # where all have read past the file's highest offset, no row is looked at
    commit(table, lake.run, append_change(lake, table, 0, 500, 501, stage(table, lake.declaration(RAW), records(0, 500, 501))))
    read_up_to(lake, 501, 3)
    monkeypatch.setattr("lakehouse.maintenance.retention.connect", None)
    assert drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now)["rows"] == 1


@SQLITE
def test_dead_letters_that_point_to_what_is_dropped_are_told(ten_days: Lake) -> None:
    lake, now = ten_days, DAY + timedelta(days=13)
    a_row_a_day(lake, 6, 0)
    read_up_to(lake, 6)
    refused = [
        {
            "topic": topic,
            "partition": 0,
            "offset": i,
            "received_at": DAY + timedelta(days=i),
            "reason": "not_json",
            "detail": None,
        }
        for topic, i in ((TOPIC, 0), (TOPIC, 2), (TOPIC, 3), ("another", 1))
    ]
    schema = records(0, 0, 1).schema.remove(4).append(pa.field("reason", pa.string())).append(pa.field("detail", pa.string()))
    write_dead_letters(lake, THINGS, pa.Table.from_pylist(refused, schema))
    assert drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now) == {"files": 3, "rows": 3, "dead_letters": 2}
    current = lake.load(RAW).current_snapshot()
    assert current is not None
    assert current.summary is not None
    assert current.summary.additional_properties["lakehouse.dead-letters"] == "2"
    assert drop_outdated(lake, lake.load(RAW), lake.declaration(RAW), now + timedelta(days=1))["dead_letters"] == 1


def test_where_partitions_end() -> None:
    assert end_of("day", 0) == datetime(1970, 1, 2, tzinfo=UTC)
    assert end_of("hour", 24) == datetime(1970, 1, 2, 1, tzinfo=UTC)
    assert end_of("month", 11) == datetime(1971, 1, 1, tzinfo=UTC)
    assert end_of("month", 12) == datetime(1971, 2, 1, tzinfo=UTC)
    assert end_of("year", 56) == datetime(2027, 1, 1, tzinfo=UTC)
    assert end_of("day", -1) == datetime(1970, 1, 1, tzinfo=UTC)


# --- tags --------------------------------------------------------------------------------------------------------------


@SQLITE
def test_tags_say_what_is_wrong(lake: Lake) -> None:
    append(lake, 0, 0, 1)
    append(lake, 0, 1, 2)
    one, two = ids(lake.load(RAW))
    tag_snapshot(lake, RAW, "q1", one)
    with pytest.raises(UsageError, match=f"q1 names snapshot {one}"):
        tag_snapshot(lake, RAW, "q1", two)
    with pytest.raises(UsageError, match="has no snapshot 12345"):
        tag_snapshot(lake, RAW, "q2", 12345)
    with pytest.raises(UsageError, match="a tag is letters"):
        tag_snapshot(lake, RAW, "a b")
    with pytest.raises(UsageError, match="has no tag 'q9'; it has: q1"):
        remove_tag(lake, RAW, "q9")
    said = history(lake.load(RAW))[0].summary
    assert said is not None
    assert (said.additional_properties["lakehouse.kind"], said.additional_properties["lakehouse.tag"]) == ("tag", "q1")
    assert position(lake) == 2
