"""The commit path under every fault we could think of, on each Iceberg catalog: SQLite, REST and Glue (see conftest.py).

Between it and the catalog is a wire that loses requests, loses answers, or lets others in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client import REGISTRY
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table
from records import (
    DAY,
    RAW,
    THINGS,
    TOPIC,
    Fault,
    Wire,
    append,
    append_change,
    first,
    live_files,
    lost_after,
    lost_after_then,
    lost_before,
    offsets,
    position,
    records,
    rewrite,
    rewrite_change,
    stored,
    things,
)

from lakehouse.checks import check_staged
from lakehouse.commit import Change, Committed, commit, scope_of
from lakehouse.dead_letters import write_dead_letters
from lakehouse.errors import ChecksFailed, CommitUnresolved, Fenced, Replan, RolledBack, Terminal, UsageError
from lakehouse.lake import Lake, history, snapshot_inputs, snapshot_vector
from lakehouse.maintenance.tags import remove_tag, tag_snapshot
from lakehouse.positions import read_positions
from lakehouse.publish import MAX_ATTEMPTS
from lakehouse.queries import connect
from lakehouse.rollback import rollback_table, rollbacks
from lakehouse.staging import stage

Reopen = Callable[[str], Lake]


def summary(table: Table) -> dict[str, str]:
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert snapshot.summary is not None
    return snapshot.summary.additional_properties


def current_id(lake: Lake, name: str = RAW) -> int:
    snapshot = lake.load(name).current_snapshot()
    assert snapshot is not None
    return snapshot.snapshot_id


def expire_all(lake: Lake, name: str = RAW) -> None:
    """Expire every snapshot but the current one."""
    table = lake.load(name)
    table.maintenance.expire_snapshots().by_ids([s.snapshot_id for s in table.snapshots()[:-1]]).commit()


# --- append at position ------------------------------------------------------------------------------------------------


def test_data_and_position_land_in_one_snapshot(lake: Lake) -> None:
    done = append(lake, 0, 0, 5)
    table = lake.load(RAW)
    assert [s.snapshot_id for s in table.snapshots()] == [done.snapshot_id]
    assert offsets(lake) == [0, 1, 2, 3, 4]
    entry = read_positions(table.metadata)[RAW][TOPIC, 0]
    assert (entry.next_offset, entry.sequence_number, entry.source) == (5, 1, "cluster/topic-id")


def test_a_zombie_is_fenced_and_its_rows_are_there_once(lake: Lake, other: Lake) -> None:
    append(lake, 0, 0, 5)
    zombie = other.open_for_write(RAW)
    change = append_change(other, zombie, 0, 5, 9)  # read its position, staged its files, and went to sleep
    append(lake, 0, 5, 8)
    with pytest.raises(Fenced, match=r"raw\.records.*events\[0\] at offset 5.*stands at 8"):
        commit(zombie, other.run, change)
    assert offsets(lake) == list(range(8))
    assert {f.file_path for f in change.add} <= stored(lake)  # orphan removal's business, not ours


def test_a_zombie_is_fenced_even_if_the_other_commits_between_check_and_swap(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    wire.faults = [first(lambda: append(other, 0, 5, 8))]
    before = counted("commit_conflicts", RAW)
    with pytest.raises(Fenced):
        commit(table, lake.run, append_change(lake, table, 0, 5, 9))
    assert offsets(lake) == list(range(8))
    assert counted("commit_conflicts", RAW) - before == 1  # of a commit that never landed


def test_writers_on_disjoint_partitions_both_commit_the_files_they_wrote_once(lake: Lake, other: Lake, wire: Wire) -> None:
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 0, 5)
    wire.faults = [first(lambda: append(other, 1, 0, 3)), first(lambda: append(other, 1, 3, 7))]
    done = commit(table, lake.run, change)
    assert (done.conflicts, done.unknown_outcomes) == (2, 0)
    assert (offsets(lake, 0), offsets(lake, 1)) == (list(range(5)), list(range(7)))
    assert (position(lake, 0), position(lake, 1)) == (5, 7)
    live = {f.file_path for f in live_files(lake.load(RAW))}
    assert {f.file_path for f in change.add} <= live
    assert stored(lake) == live  # no file was written for a second attempt


def test_a_position_does_not_go_backwards(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    before = current_id(lake)
    with pytest.raises(Fenced, match="only advance"):
        commit(lake.open_for_write(RAW), lake.run, Change(RAW, {(TOPIC, 0): 5}, {(TOPIC, 0): 4}))
    assert (position(lake), current_id(lake)) == (5, before)


def test_every_partition_the_job_read_is_fenced_not_only_those_it_advances(lake: Lake) -> None:
    append(lake, 1, 0, 3)
    with pytest.raises(Fenced, match=r"events\[1\]"):
        commit(lake.open_for_write(RAW), lake.run, Change(RAW, {(TOPIC, 0): 0, (TOPIC, 1): 0}, {(TOPIC, 0): 1}))
    with pytest.raises(Fenced, match=r"events\[1\]"):  # a partition that the job thought it was first to read
        commit(lake.open_for_write(RAW), lake.run, Change(RAW, {}, {(TOPIC, 1): 5}))


def test_nothing_to_do_makes_no_snapshot(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    before = table.metadata_location
    assert commit(table, lake.run, Change(RAW, {(TOPIC, 0): 5}, {(TOPIC, 0): 5})) == Committed(None)
    assert commit(table, lake.run, Change(RAW, {}, {})) == Committed(None)
    assert lake.load(RAW).metadata_location == before


# --- answers that are lost ---------------------------------------------------------------------------------------------


def test_an_answer_lost_after_landing_is_recognised(lake: Lake, wire: Wire) -> None:
    table = lake.open_for_write(RAW)
    wire.faults = [lost_after]
    before = counted("commit_unknown_outcomes", RAW)
    done = commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert (done.snapshot_id, done.unknown_outcomes, wire.sent) == (current_id(lake), 1, 1)
    assert counted("commit_unknown_outcomes", RAW) - before == 1
    assert offsets(lake) == list(range(5))
    assert table.metadata_location == lake.load(RAW).metadata_location  # the caller goes on from the present state


def test_a_request_lost_before_landing_is_sent_again(lake: Lake, wire: Wire) -> None:
    table = lake.open_for_write(RAW)
    wire.faults = [lost_before, lost_before]
    done = commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert (done.snapshot_id, done.unknown_outcomes, wire.sent) == (current_id(lake), 2, 3)
    assert (offsets(lake), len(stored(lake))) == (list(range(5)), 1)


def test_an_answer_lost_after_landing_is_recognised_though_others_have_gone_on(lake: Lake, other: Lake, wire: Wire) -> None:
    table = lake.open_for_write(RAW)
    wire.faults = [lost_after_then(lambda: append(other, 0, 5, 8))]
    done = commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert done.snapshot_id == history(lake.load(RAW))[1].snapshot_id
    assert (offsets(lake), position(lake)) == (list(range(8)), 8)


def test_a_conflict_that_was_a_yes_is_recognised(lake: Lake, wire: Wire) -> None:
    """botocore sends an UpdateTable again whose answer was lost, and then reports a conflict with itself."""

    def conflict_with_itself(send: Callable[[], Any]) -> Any:
        send()
        raise CommitFailedException("concurrent modification")

    table = lake.open_for_write(RAW)
    wire.faults = [conflict_with_itself]
    assert commit(table, lake.run, append_change(lake, table, 0, 0, 5)).snapshot_id == current_id(lake)
    assert offsets(lake) == list(range(5))


def test_a_request_that_arrives_late_is_either_the_first_or_refused(lake: Lake, wire: Wire) -> None:
    """Thought lost, it waits in a queue, and is carried out after (or just before) we send the same files again."""
    held: list[Callable[[], Any]] = []

    def delay(send: Callable[[], Any]) -> Any:
        held.append(send)
        raise TimeoutError

    wire.faults = [delay, first(lambda: held[0]())]
    table = lake.open_for_write(RAW)
    commit(table, lake.run, append_change(lake, table, 0, 0, 5))  # the late one is first: ours conflicts, and finds it
    assert offsets(lake) == list(range(5))

    wire.faults = [delay]
    commit(table, lake.run, append_change(lake, table, 0, 5, 9))  # ours is first
    with pytest.raises(CommitFailedException):
        held[1]()
    assert (offsets(lake), position(lake)) == (list(range(9)), 9)


def test_an_unknown_outcome_deletes_nothing(lake: Lake, other: Lake, wire: Wire) -> None:
    append(other, 1, 0, 3)
    table = lake.open_for_write(RAW)
    before: list[set[Any]] = []

    def remember(send: Callable[[], Any]) -> Any:
        before.append(stored(lake, ".avro") | stored(lake))
        return lost_after(send) if len(before) == 3 else lost_before(send)

    wire.faults = [remember, remember, remember]
    commit(table, lake.run, append_change(lake, table, 0, 0, 5))
    assert before[0] < before[2] <= stored(lake, ".avro") | stored(lake)
    present = lake.load(RAW)
    snapshot = present.current_snapshot()
    assert snapshot is not None
    entries = [e for m in snapshot.manifests(present.io) for e in m.fetch_manifest_entry(present.io)]
    assert sum(e.data_file.record_count for e in entries) == present.scan().to_arrow().num_rows == 8


@pytest.mark.parametrize("landed", [False, True])
def test_a_catalog_that_stays_away_leaves_the_commit_unresolved_and_the_files_there(
    lake: Lake, wire: Wire, monkeypatch: pytest.MonkeyPatch, landed: bool
) -> None:
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 0, 5)

    def then_away(send: Callable[[], Any]) -> Any:
        if landed:
            send()
        wire.down = True
        raise TimeoutError

    wire.faults = [then_away]
    monkeypatch.setattr("lakehouse.publish.time.sleep", lambda _: None)
    with pytest.raises(CommitUnresolved, match=rf"raw\.records: no commit in {MAX_ATTEMPTS} attempts.*Staged files were kept"):
        commit(table, lake.run, change)
    assert wire.refused_while_down == MAX_ATTEMPTS - 1
    wire.down = False
    assert {f.file_path for f in change.add} == stored(lake)
    if landed:  # the job, run again, reads this position; a writer that sends its old buffer is fenced
        assert position(lake) == 5
        with pytest.raises(Fenced):
            commit(table, lake.run, change)
    else:
        commit(table, lake.run, change)
    assert offsets(lake) == list(range(5))


# --- what else moves the table -----------------------------------------------------------------------------------------


def test_a_property_changed_by_somebody_else_does_not_disturb(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)

    def touch() -> None:
        other.load(RAW).transaction().set_properties({"comment": "changed"}).commit_transaction()

    wire.faults = [first(touch)]
    commit(table, lake.run, append_change(lake, table, 0, 5, 9))
    assert (offsets(lake), position(lake), lake.load(RAW).properties["comment"]) == (list(range(9)), 9, "changed")


def test_a_commit_to_a_branch_sets_no_positions_and_does_not_disturb(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    before = read_positions(lake.load(RAW).metadata)
    theirs = other.load(RAW)
    theirs.manage_snapshots().create_branch(current_id(other), "audit").commit()
    arrow = pa.schema([f.with_nullable(f.name == "value") for f in records(0, 0, 0).schema])

    def to_branch() -> None:
        theirs.refresh().append(records(0, 5, 6, value="on the branch").cast(arrow), branch="audit")

    to_branch()
    assert read_positions(lake.load(RAW).metadata) == before
    table = lake.open_for_write(RAW)
    wire.faults = [first(to_branch)]  # takes the sequence number that our snapshot was made with
    commit(table, lake.run, append_change(lake, table, 0, 5, 9))
    table = lake.open_for_write(RAW)
    assert (offsets(lake), position(lake)) == (list(range(9)), 9)
    main = table.current_snapshot()
    assert main is not None
    assert read_positions(table.metadata)[RAW][TOPIC, 0].sequence_number == main.sequence_number == 4
    assert len(history(table)) == 2


def test_a_new_column_committed_by_somebody_else_does_not_disturb(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    from pyiceberg.types import StringType

    wire.faults = [first(lambda: other.load(RAW).update_schema().add_column("extra", StringType()).commit())]
    commit(table, lake.run, append_change(lake, table, 0, 5, 9))
    assert offsets(lake) == list(range(9))


# --- what a snapshot says ----------------------------------------------------------------------------------------------


def test_a_change_of_position_alone_makes_an_empty_snapshot_that_says_everything(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    append(lake, 1, 0, 2)
    table = lake.open_for_write(RAW)
    done = commit(
        table, lake.run, Change(RAW, {(TOPIC, 0): 5}, {(TOPIC, 0): 9}, inputs={"raw.other": 2**62}, note={"why": "test"})
    )
    said = summary(lake.load(RAW))
    assert json.loads(said["lakehouse.positions"]) == {RAW: {"events/0": 9, "events/1": 2}}
    assert (said["lakehouse.run-id"], said["lakehouse.code-version"]) == ("one", "test")
    assert (said["lakehouse.kind"], said["lakehouse.why"]) == ("append", "test")
    assert (said["total-records"], "added-records" in said) == ("7", False)
    snapshot = lake.load(RAW).current_snapshot()
    assert snapshot is not None
    assert snapshot.snapshot_id == done.snapshot_id
    assert snapshot_inputs(snapshot) == {"raw.other": 2**62}
    assert snapshot_vector(snapshot, RAW) == {(TOPIC, 0): 9, (TOPIC, 1): 2}
    assert position(lake) == 9


def test_a_change_of_position_alone_can_be_the_first_snapshot(lake: Lake) -> None:
    commit(lake.open_for_write(RAW), lake.run, Change(RAW, {}, {(TOPIC, 0): 9}))
    assert (offsets(lake), position(lake)) == ([], 9)
    append(lake, 0, 9, 11)
    assert offsets(lake) == [9, 10]


def test_positions_survive_the_expiry_of_snapshots(lake: Lake) -> None:
    for i in range(3):
        append(lake, i, 0, 4)
    expire_all(lake)
    assert len(lake.load(RAW).snapshots()) == 1
    assert lake.vector(RAW) == {(TOPIC, i): 4 for i in range(3)}
    append(lake, 0, 4, 6)
    assert offsets(lake, 0) == list(range(6))


# --- rewrite at base ---------------------------------------------------------------------------------------------------

EU = {"thing_id": "t1", "region": "eu"}
US = {"thing_id": "t1", "region": "us"}


def test_a_rewrite_replaces_its_files(lake: Lake) -> None:
    rewrite(lake, things(EU, US))
    table = lake.open_for_write(THINGS)
    old = [f for f in live_files(table) if f.partition[1] == "eu"]
    commit(table, lake.run, rewrite_change(table, lake, things(EU | {"amount": 7}), remove=old))
    assert {(r["region"], r["amount"]) for r in lake.load(THINGS).scan().to_arrow().to_pylist()} == {("eu", 7), ("us", 1)}


def test_a_file_that_another_rewrite_replaced_means_plan_again(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU | {"amount": 7}), remove=live_files(table))
    rewrite(other, things(EU | {"amount": 8}), remove=live_files(other.load(THINGS)))
    with pytest.raises(Replan):
        commit(table, lake.run, change)
    assert [r["amount"] for r in lake.load(THINGS).scan().to_arrow().to_pylist()] == [8]


def test_a_file_that_another_rewrite_only_removed_means_plan_again(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU | {"amount": 7}), remove=live_files(table))
    rewrite(other, things(), remove=live_files(other.load(THINGS)))
    for _ in range(25):  # so that manifests are merged meanwhile
        rewrite(other, things(US))
    with pytest.raises(Replan, match="planned on was replaced"):
        commit(table, lake.run, change)


@pytest.mark.parametrize("region", ["eu", None])
def test_a_file_added_in_scope_means_plan_again_and_outside_it_does_not(lake: Lake, other: Lake, region: str | None) -> None:
    here = {"thing_id": "t1", "region": region}
    rewrite(lake, things(here))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(here | {"amount": 7}), remove=live_files(table))
    rewrite(other, things(US))  # the same bucket, another region
    commit(table, lake.run, change)
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(here | {"amount": 9}))
    rewrite(other, things(here | {"amount": 8}))
    with pytest.raises(Replan, match="added in the rewrite's scope"):
        commit(table, lake.run, change)


def test_scope_knows_a_day_however_it_was_read(lake: Lake, other: Lake) -> None:
    """A day is written as one Python type and may be read back as another: the scope must see the same partition."""
    table = lake.open_for_write(RAW)
    files = stage(table, lake.declaration(RAW), records(0, 0, 2))
    change = Change(RAW, {}, {}, add=files, rewrite=True, base=None, scope=scope_of(files))
    other_table = other.open_for_write(RAW)
    commit(other_table, other.run, append_change(other, other_table, 1, 0, 2))
    with pytest.raises(Replan):
        commit(table, lake.run, change)
    read = live_files(lake.load(RAW))
    change = Change(RAW, {}, {}, add=files, rewrite=True, base=current_id(lake), scope=scope_of(read))  # as a compaction plans
    append(other, 1, 2, 4)
    with pytest.raises(Replan):
        commit(table, lake.run, change)
    tomorrow = stage(table, lake.declaration(RAW), records(0, 0, 2, DAY + timedelta(days=1)))
    change = Change(RAW, {}, {}, add=tomorrow, rewrite=True, base=current_id(lake), scope=scope_of(tomorrow))
    append(other, 1, 4, 6)
    assert commit(table, lake.run, change).conflicts == 0


def test_a_rewrite_of_the_whole_table_must_have_been_alone(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU), remove=live_files(table), scope="table")
    rewrite(other, things(US))
    with pytest.raises(Replan):
        commit(table, lake.run, change)


def test_a_rewrite_without_a_scope_goes_on_beside_appends_to_its_own_partition(lake: Lake, other: Lake) -> None:
    """Compaction changes no rows, so it need not mind new ones; but the files that it replaces must still be there."""
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU), remove=live_files(table), scope=frozenset())
    rewrite(other, things(EU | {"amount": 2}))
    commit(table, lake.run, change)
    assert sorted(r["amount"] for r in lake.load(THINGS).scan().to_arrow().to_pylist()) == [1, 2]
    with pytest.raises(Replan):
        commit(table, lake.run, change)


def test_a_rewrite_is_checked_again_at_every_attempt(lake: Lake, other: Lake, wire: Wire) -> None:
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU))
    wire.faults = [first(lambda: rewrite(other, things(EU)))]
    with pytest.raises(Replan):
        commit(table, lake.run, change)
    assert lake.load(THINGS).scan().to_arrow().num_rows == 1


def test_a_rewrite_whose_answer_was_lost_is_recognised_and_not_planned_again(lake: Lake, other: Lake, wire: Wire) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(EU | {"amount": 7}), remove=live_files(table))
    wire.faults = [lost_after_then(lambda: rewrite(other, things(US)))]
    assert commit(table, lake.run, change).unknown_outcomes == 1
    assert {r["amount"] for r in lake.load(THINGS).scan().to_arrow().to_pylist()} == {1, 7}


def test_a_base_that_expired_means_plan_again(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(US))
    for i in range(3):
        rewrite(other, things({"thing_id": f"x{i}", "region": "asia"}))
    expire_all(other, THINGS)
    with pytest.raises(Replan, match="expired"):
        commit(table, lake.run, change)


def test_a_rewrite_planned_on_an_empty_table_sees_what_expired_snapshots_added(lake: Lake, other: Lake) -> None:
    table = lake.open_for_write(THINGS)
    ours, elsewhere = rewrite_change(table, lake, things(EU)), rewrite_change(table, lake, things(US))
    rewrite(other, things(EU))
    rewrite(other, things({"thing_id": "x", "region": "asia"}))
    expire_all(other, THINGS)
    with pytest.raises(Replan):
        commit(table, lake.run, ours)
    assert commit(table, lake.run, elsewhere).conflicts == 0


def test_a_file_of_another_partition_spec_might_be_in_scope(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things(), remove=live_files(table))  # adds nothing that would have to be staged again
    other.load(THINGS).update_spec().remove_field("region").commit()
    rewrite(other, things(EU | {"amount": 8}))
    with pytest.raises(Replan, match="added in the rewrite's scope"):
        commit(table, lake.run, change)


def test_a_base_that_is_not_in_the_history_means_plan_again(lake: Lake, other: Lake) -> None:
    rewrite(lake, things(EU))
    start = current_id(lake, THINGS)
    rewrite(lake, things(US))
    table = lake.open_for_write(THINGS)
    change = rewrite_change(table, lake, things({"thing_id": "t9", "region": "asia"}))
    other.load(THINGS).manage_snapshots().set_current_snapshot(start).commit()
    with pytest.raises(Replan, match="no longer in the table's history"):
        commit(table, lake.run, change)


def test_of_two_inserts_of_one_id_with_disjoint_positions_one_must_plan_again(lake: Lake, other: Lake) -> None:
    table, theirs = lake.open_for_write(THINGS), other.open_for_write(THINGS)
    ours = rewrite_change(table, lake, things(EU), expected={(TOPIC, 0): 0}, reached={(TOPIC, 0): 5})
    commit(theirs, other.run, rewrite_change(theirs, other, things(EU), expected={(TOPIC, 1): 0}, reached={(TOPIC, 1): 5}))
    with pytest.raises(Replan):
        commit(table, lake.run, ours)
    assert lake.load(THINGS).scan().to_arrow().num_rows == 1
    assert lake.vector(THINGS) == {(TOPIC, 1): 5}


def test_the_fence_comes_before_the_base(lake: Lake, other: Lake) -> None:
    """Planning again cannot help a job whose positions are gone."""
    table = lake.open_for_write(THINGS)
    ours = rewrite_change(table, lake, things(EU), expected={(TOPIC, 0): 0}, reached={(TOPIC, 0): 5})
    rewrite(other, things(EU), expected={(TOPIC, 0): 0}, reached={(TOPIC, 0): 5})
    with pytest.raises(Fenced):
        commit(table, lake.run, ours)


def test_files_staged_under_another_partition_spec_are_staged_again(lake: Lake, other: Lake) -> None:
    append(lake, 0, 0, 5)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 5, 9)
    other.load(RAW).update_spec().add_field("topic", "identity", "topic").commit()
    with pytest.raises(Replan, match="stage them again"):
        commit(table, lake.run, change)
    append(lake, 0, 5, 9)
    assert offsets(lake) == list(range(9))


def test_a_rewrite_goes_on_beside_appends_to_other_partitions(lake: Lake, other: Lake, wire: Wire) -> None:
    rewrite(lake, things(EU, US))
    table = lake.open_for_write(THINGS)
    old = [f for f in live_files(table) if f.partition[1] == "eu"]
    change = rewrite_change(table, lake, things(EU | {"amount": 7}), remove=old)
    wire.faults = [first(lambda: rewrite(other, things({"thing_id": "t2", "region": "us"})))]
    assert commit(table, lake.run, change).conflicts == 1
    assert sorted(r["amount"] for r in lake.load(THINGS).scan().to_arrow().to_pylist()) == [1, 1, 7]


def test_rewrites_keep_few_manifests_and_lose_no_file(lake: Lake, other: Lake) -> None:
    """pyiceberg's own overwrite would leave two more with each of these, and read them all in the next."""
    rewrite(lake, things(EU, US, {"thing_id": "kept", "region": "asia"}))
    planned = lake.open_for_write(THINGS)
    old = [f for f in live_files(planned) if f.partition[1] == "us"]
    change = rewrite_change(planned, lake, things(US | {"amount": 9}), remove=old)
    for amount in range(2, 26):
        eu = [f for f in live_files(other.load(THINGS)) if f.partition[1] == "eu"]
        rewrite(other, things(EU | {"amount": amount}), remove=eu)
    commit(planned, lake.run, change)  # what others did elsewhere is seen through merged manifests
    table = lake.load(THINGS)
    snapshot = table.current_snapshot()
    assert snapshot is not None
    assert len(snapshot.manifests(table.io)) < 6
    assert sorted(r["amount"] for r in table.scan().to_arrow().to_pylist()) == [1, 9, 25]
    assert (summary(table)["total-data-files"], summary(table)["total-records"]) == ("3", "3")
    with pytest.raises(Replan):
        commit(planned, lake.run, change)


# --- rollback ----------------------------------------------------------------------------------------------------------


def test_a_table_rolled_back_without_its_positions_is_refused(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    target = current_id(lake)
    table = lake.open_for_write(RAW)
    change = append_change(lake, table, 0, 8, 9)
    append(lake, 0, 5, 8)
    lake.load(RAW).manage_snapshots().set_current_snapshot(target).commit()
    with pytest.raises(RolledBack, match=r"lakehouse rollback raw\.records"):
        lake.open_for_write(RAW)
    with pytest.raises(RolledBack):
        commit(table, lake.run, change)
    rollback_table(lake, RAW, target)  # what the message says to do
    append(lake, 0, 5, 8)
    assert offsets(lake) == list(range(8))


def test_a_rollback_is_noticed_though_somebody_else_has_committed_since(lake: Lake) -> None:
    """A snapshot made by another tool after the rollback is newer than every position, and still does not hold their data."""
    append(lake, 0, 0, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    lake.load(RAW).manage_snapshots().set_current_snapshot(target).commit()
    lake.load(RAW).delete("offset = 4")  # as Spark might
    with pytest.raises(RolledBack):
        lake.open_for_write(RAW)


def test_rollback_restores_the_positions_in_the_same_commit_and_writers_go_on(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    append(lake, 1, 0, 3)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    append(lake, 2, 0, 2)
    before = len(lake.load(RAW).metadata.metadata_log)
    assert rollback_table(lake, RAW, target) == {RAW: {"events/0": 5, "events/1": 3}}
    table = lake.open_for_write(RAW)
    assert len(table.metadata.metadata_log) == before + 1
    assert (lake.vector(RAW), current_id(lake)) == ({(TOPIC, 0): 5, (TOPIC, 1): 3}, target)
    assert read_positions(table.metadata)[RAW][TOPIC, 0].source == "cluster/topic-id"
    append(lake, 0, 5, 7)
    append(lake, 2, 0, 4)
    assert (offsets(lake, 0), offsets(lake, 1), offsets(lake, 2)) == (list(range(7)), [0, 1, 2], [0, 1, 2, 3])


def test_rollback_to_a_snapshot_of_another_tool_restores_the_positions_before_it(lake: Lake) -> None:
    """Such a snapshot says nothing of positions, because it moved none: they are those of the last one that does."""
    append(lake, 0, 0, 5)
    lake.load(RAW).delete("offset = 4")
    foreign = current_id(lake)
    append(lake, 0, 5, 8)
    assert rollback_table(lake, RAW, foreign) == {RAW: {"events/0": 5}}
    assert lake.vector(RAW) == {(TOPIC, 0): 5}
    append(lake, 0, 5, 6)
    assert offsets(lake) == [0, 1, 2, 3, 5]


def test_rollback_is_refused_if_the_positions_of_its_target_are_not_known(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    lake.load(RAW).delete("offset = 4")
    foreign = current_id(lake)
    append(lake, 0, 5, 8)
    table = lake.load(RAW)
    table.maintenance.expire_snapshots().by_id(table.snapshots()[0].snapshot_id).commit()
    with pytest.raises(UsageError, match="positions"):
        rollback_table(lake, RAW, foreign)
    assert lake.vector(RAW) == {(TOPIC, 0): 8}


def test_rollback_goes_to_the_tables_own_history_alone(lake: Lake) -> None:
    append(lake, 0, 0, 5)
    first_id = current_id(lake)
    append(lake, 0, 5, 8)
    abandoned = current_id(lake)
    rollback_table(lake, RAW, first_id)
    for unknown in (12345, abandoned):
        with pytest.raises(UsageError, match=f"{unknown} is not in its history"):
            rollback_table(lake, RAW, unknown)


def test_a_rollback_between_check_and_swap_is_noticed(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    table = lake.open_for_write(RAW)
    wire.faults = [first(lambda: rollback_table(other, RAW, target))]
    with pytest.raises(Fenced):
        commit(table, lake.run, append_change(lake, table, 0, 8, 9))
    assert offsets(lake) == list(range(5))


@pytest.mark.parametrize("fault", [lost_before, lost_after])
def test_a_rollback_whose_answer_is_lost_is_done_once(lake: Lake, wire: Wire, fault: Fault) -> None:
    append(lake, 0, 0, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    from_id, before = current_id(lake), len(lake.load(RAW).metadata.metadata_log)
    wire.faults = [fault]
    assert rollback_table(lake, RAW, target) == {RAW: {"events/0": 5}}
    table = lake.load(RAW)
    assert (current_id(lake), lake.vector(RAW), len(table.metadata.metadata_log)) == (target, {(TOPIC, 0): 5}, before + 1)
    assert [(r["run"], r["from"], r["to"]) for r in rollbacks(table)] == [("one", from_id, target)]
    append(lake, 0, 5, 7)
    assert offsets(lake) == list(range(7))


def test_a_rollback_that_landed_is_not_done_again_whatever_came_since(lake: Lake, other: Lake, wire: Wire) -> None:
    """Its answer is lost; a writer goes on, somebody rolls back again, a writer goes on again: nothing of that is undone."""
    append(lake, 0, 0, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)

    def go_on() -> None:
        append(other, 0, 5, 6)
        rollback_table(other, RAW, target)
        append(other, 0, 5, 9)

    wire.faults = [lost_after_then(go_on)]
    rollback_table(lake, RAW, target)
    assert (offsets(lake), position(lake)) == (list(range(9)), 9)
    assert [r["run"] for r in rollbacks(lake.load(RAW))] == ["one", "other"]


def test_a_rollback_overtaken_by_a_writer_takes_its_rows_and_its_positions_back(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    wire.faults = [first(lambda: append(other, 1, 0, 3))]
    assert rollback_table(lake, RAW, target) == {RAW: {"events/0": 5}}
    assert (offsets(lake), offsets(lake, 1), lake.vector(RAW)) == (list(range(5)), [], {(TOPIC, 0): 5})
    append(lake, 1, 0, 3)
    append(lake, 0, 5, 8)
    assert (offsets(lake), offsets(lake, 1)) == (list(range(8)), [0, 1, 2])


def test_a_rollback_overtaken_by_an_older_one_is_refused(lake: Lake, other: Lake, wire: Wire) -> None:
    append(lake, 0, 0, 2)
    older = current_id(lake)
    append(lake, 0, 2, 5)
    target = current_id(lake)
    append(lake, 0, 5, 8)
    wire.faults = [first(lambda: rollback_table(other, RAW, older))]
    with pytest.raises(UsageError, match=f"{target} is not in its history"):
        rollback_table(lake, RAW, target)
    assert (offsets(lake), position(lake)) == ([0, 1], 2)


@pytest.mark.parametrize("fault", [lost_before, lost_after])
def test_a_tag_whose_answer_is_lost_is_set_once(lake: Lake, wire: Wire, fault: Fault) -> None:
    append(lake, 0, 0, 5)
    target = current_id(lake)
    wire.faults = [fault]
    assert tag_snapshot(lake, RAW, "audit") == target
    assert lake.load(RAW).metadata.refs["audit"].snapshot_id == target
    wire.faults = [fault]
    remove_tag(lake, RAW, "audit")
    assert set(lake.load(RAW).metadata.refs) == {"main"}
    assert len(history(lake.load(RAW))) == 3


# --- staging and checks ------------------------------------------------------------------------------------------------


def test_staged_files_are_sorted_by_the_declared_order_and_unpublished(lake: Lake) -> None:
    table = lake.open_for_write(RAW)
    rows = pa.concat_tables([records(1, 0, 50), records(0, 0, 50), records(0, 0, 9, DAY + timedelta(days=1))])
    shuffled = rows.take(pa.array(sorted(range(len(rows)), key=lambda i: (i * 7919) % 104_729)))
    files = stage(table, lake.declaration(RAW), shuffled)
    assert [f.spec_id for f in files] == [0, 0]
    assert len(offsets(lake)) == 0
    import pyarrow.parquet as pq

    for file in files:
        with table.io.new_input(file.file_path).open() as stream:
            held = pq.read_table(stream).select(["topic", "partition", "offset"]).to_pylist()
        assert held == sorted(held, key=lambda r: (r["topic"], r["partition"], r["offset"]))
    assert sum(f.record_count for f in files) == 109


def test_rows_that_do_not_fit_are_refused_before_a_file_is_written(lake: Lake) -> None:
    table = lake.open_for_write(THINGS)
    with pytest.raises(Terminal, match=r"billing\.things: column 'colour' is not declared"):
        stage(table, lake.declaration(THINGS), things(EU).append_column("colour", pa.array(["red"])))
    with pytest.raises(Terminal, match=r"column 'amount' does not fit int64") as refused:
        stage(table, lake.declaration(THINGS), pa.table({"thing_id": ["t1"], "amount": ["secret"]}))
    assert "secret" not in str(refused.value)
    assert stored(lake) == set()
    assert stage(table, lake.declaration(THINGS), things()) == []


def test_staged_files_that_break_a_rule_are_held(lake: Lake) -> None:
    table, declared = lake.open_for_write(THINGS), lake.declaration(THINGS)
    rows = things(EU, EU, {"thing_id": "t2", "amount": 0}, {"thing_id": "t3", "amount": None}, {"thing_id": "t4", "status": "?"})
    files = stage(table, declared, rows)
    with connect(lake.settings) as connection, pytest.raises(ChecksFailed) as held:
        check_staged(connection, declared, files)
    message = str(held.value)
    assert message.startswith("billing.things: the batch was held, nothing was committed: ")
    assert message.endswith(f"Rules: {declared.path}")
    for part in ('unique("thing_id"): 1 rows', "accepted(status): 1 rows", "amount_positive: 2 rows"):
        assert part in message
    assert "not_null(thing_id)" not in message
    assert (held.value.exit_code, lake.load(THINGS).snapshots()) == (3, [])
    with pytest.raises(ChecksFailed, match=r"nothing was committed: not_null\(thing_id\): 1 rows; not_null\(status\): 2 rows"):
        stage(table, declared, things(EU | {"status": None}, US | {"thing_id": None, "status": None}))
    with connect(lake.settings) as connection:
        check_staged(connection, declared, stage(table, declared, things(EU, {"thing_id": "t6", "status": "it's"})))
        check_staged(connection, declared, [])


# --- dead letters ------------------------------------------------------------------------------------------------------


def rejected(*at: int, topic: str = TOPIC, partition: int = 0, reason: str = "not_json") -> pa.Table:
    return pa.table(
        {
            "topic": pa.array([topic] * len(at), pa.string()),
            "partition": pa.array([partition] * len(at), pa.int32()),
            "offset": pa.array(at, pa.int64()),
            "received_at": pa.array([DAY] * len(at), pa.timestamp("us", "UTC")),
            "reason": pa.array([reason] * len(at), pa.string()),
            "detail": pa.nulls(len(at), pa.string()),
        }
    )


def counted(metric: str, table: str) -> float:
    return REGISTRY.get_sample_value(f"lakehouse_{metric}_total", {"table": table}) or 0.0


def dead(lake: Lake) -> list[tuple[str, str, int, int, str]]:
    rows = lake.load("ops.dead_letters").scan().to_arrow().to_pylist()
    return sorted((r["consumer"], r["topic"], r["partition"], r["offset"], r["reason"]) for r in rows)


def test_dead_letters_are_kept_once_for_each_consumer_and_record(lake: Lake) -> None:
    before = counted("dead_letters", THINGS)
    assert write_dead_letters(lake, THINGS, rejected()) == 0
    assert not lake.exists("ops.dead_letters")
    assert write_dead_letters(lake, THINGS, rejected(3, 5, 3)) == 2
    snapshot = current_id(lake, "ops.dead_letters")
    assert write_dead_letters(lake, THINGS, rejected(5, 3, reason="another reason")) == 0
    assert current_id(lake, "ops.dead_letters") == snapshot
    assert write_dead_letters(lake, THINGS, rejected(5, 6)) == 1
    assert write_dead_letters(lake, "product.events", rejected(5)) == 1
    assert write_dead_letters(lake, THINGS, rejected(5, partition=1)) == 1
    assert counted("dead_letters", THINGS) - before == 4
    assert dead(lake) == [
        (THINGS, TOPIC, 0, 3, "not_json"),
        (THINGS, TOPIC, 0, 5, "not_json"),
        (THINGS, TOPIC, 0, 6, "not_json"),
        (THINGS, TOPIC, 1, 5, "not_json"),
        ("product.events", TOPIC, 0, 5, "not_json"),
    ]


def test_dead_letters_written_by_two_at_once_are_kept_once(lake: Lake, other: Lake, wire: Wire) -> None:
    write_dead_letters(lake, THINGS, rejected(1))
    wire.faults = [first(lambda: write_dead_letters(other, THINGS, rejected(2, 3))), lost_after]
    assert write_dead_letters(lake, THINGS, rejected(3, 4)) == 1
    assert [row[3] for row in dead(lake)] == [1, 2, 3, 4]


def test_dead_letters_are_committed_before_the_data_they_were_left_out_of(lake: Lake, tmp_path: Any) -> None:
    """A transform that refuses every odd offset, run by the runner; then again after a kill between the two commits."""
    from dataclasses import replace

    from lakehouse.runner import run_table

    (tmp_path / "transforms" / "billing").mkdir(parents=True)
    (tmp_path / "transforms" / "billing" / "things.py").write_text(
        """
from lakehouse.transforms import Built
INPUTS = ("raw.records",)

def build(inputs):
    rows = inputs.sql('''SELECT 't' || "offset" AS thing_id, 'eu' AS region, 'on' AS status, 1 AS amount
                         FROM raw.records WHERE "offset" % 2 = 0''')
    bad = inputs.sql('''SELECT topic, partition, "offset", received_at, 'odd' AS reason, NULL::VARCHAR AS detail
                        FROM raw.records WHERE "offset" % 2 = 1''')
    return Built(rows, bad)
"""
    )
    lake = replace(lake, settings=lake.settings.model_copy(update={"transforms_dir": tmp_path / "transforms"}))
    append(lake, 0, 0, 6)
    real, sent = lake.catalog.commit_table, []

    class Killed(BaseException):
        """Nothing may catch it, as nothing catches SIGKILL."""

    def die_at_the_second(table: Table, *args: Any) -> Any:
        sent.append(".".join(table.name()))
        if sent[-1] == THINGS:
            raise Killed
        return real(table, *args)

    lake.catalog.commit_table = die_at_the_second  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run_table(lake, THINGS)
    assert sent == ["ops.dead_letters", THINGS]
    assert ([row[3] for row in dead(lake)], lake.vector(THINGS)) == ([1, 3, 5], {})

    lake.catalog.commit_table = real  # type: ignore[method-assign]
    report = run_table(lake, THINGS)
    assert (report.rows, report.rejected, lake.vector(THINGS)) == (3, 0, {(TOPIC, 0): 6})
    assert [row[3] for row in dead(lake)] == [1, 3, 5]
    letters, data = lake.load("ops.dead_letters").current_snapshot(), lake.load(THINGS).current_snapshot()
    assert letters is not None
    assert data is not None
    assert letters.timestamp_ms <= data.timestamp_ms
