"""The one commit path: these staged files, this table, advance these positions from the values read to the values reached.

Data and positions land in the same Iceberg commit, or not at all. Two kinds:

- append at position: accepted only if the positions still hold what the job read when it began;
- rewrite at base: besides, the files it planned on are still live, and no file was added in its scope since its base.

pyiceberg's own retry is not used: it drops the snapshot requirement and rebases, so that a zombie's append of the same
offsets succeeds, and after a lost response it deletes manifests that are live. Our loop (lakehouse/publish.py) reloads, checks,
and commits with no library retry; the catalog's compare-and-swap closes the gap between the check and the commit, because
every commit that moves a position also moves the snapshot, and `main` must still be at the snapshot that was checked. The
same loop serves SQL, REST and Glue catalogs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyiceberg.exceptions import ValidationException
from pyiceberg.manifest import DataFile, DataFileContent, ManifestEntryStatus
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation, Snapshot
from pyiceberg.table.update import AssertTableUUID, SetPropertiesUpdate, TableUpdate
from pyiceberg.typedef import Record

from lakehouse import failpoints
from lakehouse.errors import Fenced, Replan
from lakehouse.files import modified_ms
from lakehouse.lake import Run
from lakehouse.live import about, deletes_of, files_where, position_deletes
from lakehouse.positions import (
    TopicPartition,
    Vector,
    dump_vector,
    position_properties,
    read_positions,
    refuse_rolled_back,
    vector_of,
)
from lakehouse.publish import Request, publish
from lakehouse.snapshots import Append, Cluster, OneSnapshot, Overwrite

SWEPT = "lakehouse.swept-before"
"""Table property: files modified before this time (ms, by the store's clock) that no snapshot named may have been removed."""

COMPACTION = "compact"
"""`lakehouse.kind` of a snapshot that holds the rows of its parent in other files."""

Scope = frozenset[tuple[int, Record]] | Literal["table"]
"""Where a rewrite must have been alone since its base: (spec id, partition) pairs, or the whole table.

Empty: nowhere (snapshot isolation, for what changes no rows): only the files it removes must still be live.
"""


@dataclass(frozen=True)
class Change:
    """What one commit does.

    consumer: whose positions advance. expected: the vector the job read when it began; reached: where it stands now.
    base: for a rewrite, the snapshot it planned on (None only if the table had none); scope: where it must have been alone.
    rewrite: False is an append at position. inputs: snapshot ids of what it read. sources: origin of each topic.
    note: more for the summary; its `kind` says what maintenance did. updates: table updates that land in the same commit (a
    property, a tag). refuse: is called with the metadata of each attempt and raises what forbids it. cluster: write the
    manifests anew, by partition. by_hand: a person sets positions, back if need be (lakehouse/reposition.py).
    """

    consumer: str
    expected: Vector
    reached: Vector
    add: Sequence[DataFile] = ()
    remove: Sequence[DataFile] = ()
    rewrite: bool = False
    base: int | None = None
    scope: Scope = "table"
    inputs: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    note: Mapping[str, str] = field(default_factory=dict)
    updates: Sequence[TableUpdate] = ()
    refuse: Callable[[TableMetadata], None] | None = None
    cluster: bool = False
    by_hand: bool = False


@dataclass(frozen=True)
class Committed:
    """What a commit did: its snapshot, None when there was nothing to do; and how often others were in its way."""

    snapshot_id: int | None
    conflicts: int = 0
    unknown_outcomes: int = 0


def scope_of(files: Sequence[DataFile]) -> frozenset[tuple[int, Record]]:
    """The scope made of the partitions that `files` lie in."""
    return frozenset((f.spec_id, f.partition) for f in files)


def commit(table: Table, run: Run, change: Change) -> Committed:
    """Publish `change`, exactly once, whatever other writers do and whatever answer is lost.

    `table`: as loaded before the files were staged; it is refreshed. Nothing happens when there is nothing to change.

    Raises:
        Fenced: the positions have moved: another writer did this work, drop the buffer.
        Replan: (rewrites) the base is outdated where it matters; plan again on the present state. (Both kinds) the files were
            staged under another partition spec, or so long ago that they were removed as orphans.
        RolledBack: the table was rolled back without its positions.
        CommitUnresolved: the catalog or the object store stayed away; files are kept, run the job again.
        Terminal: the table was dropped, or the catalog or store refuses it (rights, keys).
    """
    name = ".".join(table.name())
    expected = dict(change.expected)
    moves = {k: v for k, v in change.reached.items() if expected.get(k, 0) != v or k not in expected}
    if not (moves or change.add or change.remove or change.updates or change.cluster or change.by_hand):
        return Committed(None)
    if (backwards := {k: v for k, v in moves.items() if v < expected.get(k, 0)}) and not change.by_hand:
        raise Fenced(f"{name}: {change.consumer} would go back at {backwards}; positions only advance")
    swept = table.properties.get(SWEPT)
    attempted: list[int] = []

    def build() -> Request:
        refuse_rolled_back(name, table.metadata)
        _refuse_fenced(name, table.metadata, change.consumer, expected, change.reached)
        if any(f.spec_id != table.metadata.default_spec_id for f in change.add if f.content == DataFileContent.DATA):
            # pyiceberg would list them under the present spec all the same, with partition values that are not its own
            raise Replan(f"{name}: the partition spec has changed since the files were staged; stage them again")
        if change.refuse:
            change.refuse(table.metadata)
        try:
            if change.add and table.properties.get(SWEPT) != swept:
                _refuse_swept(name, table, change.add)
            if change.rewrite:
                _refuse_other_deletes(name, table, change)
                _refuse_outdated(name, table, change)
            failpoints.hit("commit.checked")
            request, snapshot_id = _build(table, run, change)
        except ValidationException as error:
            raise Replan(f"{name}: a file that the rewrite planned on is gone; plan again") from error
        attempted.append(snapshot_id)
        return request

    sent = publish(table, build, lambda: _landed(table, attempted) is not None)
    return Committed(_landed(table, attempted), sent.conflicts, sent.unknown_outcomes)


def _build(table: Table, run: Run, change: Change) -> tuple[Request, int]:
    """One snapshot on the table as loaded: its manifests are written, nothing is sent. (The request, the snapshot id.)"""
    metadata = table.metadata
    vectors = {c: {k: p.next_offset for k, p in v.items()} for c, v in read_positions(metadata).items()}
    vectors[change.consumer] = {**vectors.get(change.consumer, {}), **change.reached}
    summary = {
        "lakehouse.kind": "rewrite" if change.rewrite else "append",
        "lakehouse.run-id": run.run_id,
        "lakehouse.code-version": run.code_version,
        "lakehouse.positions": json.dumps({c: dump_vector(v) for c, v in sorted(vectors.items())}),
        "lakehouse.inputs": json.dumps({k: str(v) for k, v in sorted(change.inputs.items())}),
        **{f"lakehouse.{k}": v for k, v in change.note.items()},
    }
    transaction = OneSnapshot(table)
    takes_out = change.remove or any(f.content != DataFileContent.DATA for f in change.add)
    operation, kind = (Operation.OVERWRITE, Overwrite) if takes_out else (Operation.APPEND, Append)
    producer = (Cluster if change.cluster else kind)(operation, transaction, table.io, snapshot_properties=summary)
    for file in change.add:
        producer.append_data_file(file)
    for file in change.remove:
        producer.delete_data_file(file)
        for deletes in deletes_of(file):
            producer.delete_data_file(deletes)
    producer.commit()  # stages the snapshot in the transaction; sends nothing
    properties = position_properties(change.consumer, change.reached, metadata.next_sequence_number(), change.sources)
    updates = (*transaction._updates, SetPropertiesUpdate(updates=properties), *change.updates)
    requirements = (*transaction._requirements, AssertTableUUID(uuid=metadata.table_uuid))
    return (updates, requirements), producer.snapshot_id


def _landed(table: Table, attempted: Sequence[int]) -> int | None:
    """The attempted snapshot that the table has, if any: a lost answer was a yes (even if it was rolled back since)."""
    return next((i for i in reversed(attempted) if table.metadata.snapshot_by_id(i) is not None), None)


def _refuse_fenced(
    name: str, metadata: TableMetadata, consumer: str, expected: Mapping[TopicPartition, int], reached: Vector
) -> None:
    """The fence: every partition concerned must stand where the job found it."""
    present = vector_of(metadata, consumer)
    for key in sorted({*expected, *reached}):
        if present.get(key, 0) != expected.get(key, 0):
            raise Fenced(
                f"{name}: {consumer} began {key[0]}[{key[1]}] at offset {expected.get(key, 0)}, but the table now stands at "
                f"{present.get(key, 0)}: another writer went on. Nothing was committed; start again from the table's positions"
            )


def _refuse_swept(name: str, table: Table, files: Sequence[DataFile]) -> None:
    """Orphan removal began since the table was loaded: what it takes for an orphan must never be committed.

    It decides by the same two facts, the file's time in the store and the property, so it does not matter which of the two
    comes first to the file.
    """
    before = int(table.properties.get(SWEPT, 0))
    if any((modified_ms(table.io, f.file_path) or 0) < before for f in files):
        raise Replan(f"{name}: files staged so long ago that orphan removal takes them; stage them again")


def _refuse_other_deletes(name: str, table: Table, change: Change) -> None:
    """A file is replaced with what is deleted of it: rows deleted since the plan would come back."""
    snapshot = table.current_snapshot()
    removed = {f.file_path: deletes_of(f) for f in change.remove if f.content == DataFileContent.DATA}
    present = position_deletes(table, snapshot) if snapshot and removed else {}
    if any(set(present.get(path, ())) != set(known) for path, known in removed.items()):
        raise Replan(f"{name}: rows of a file that the rewrite planned on were deleted meanwhile; plan again")


def _refuse_outdated(name: str, table: Table, change: Change) -> None:
    """A rewrite must have been alone in its scope, and its files must be live: look only at what came since its base.

    Without a scope only the files must be live, which pyiceberg checks when it builds the snapshot: the base may expire. Of a
    file that only loses rows it does not check that.
    """
    thinned = {path for f in change.add if (path := about(f))}
    if not change.scope and not thinned:
        return
    current = table.current_snapshot()
    if current is None or current.snapshot_id == change.base:
        if change.base is not None and current is None:
            raise Replan(f"{name}: the base snapshot of the rewrite is gone; plan again")
        return
    if change.base is None:  # all that is live came since, whether its snapshot is still kept or not
        if any(_in_scope(file, change.scope) for file in files_where(table)):
            raise Replan(f"{name}: files were added in the rewrite's scope since its base; plan again")
        return
    planned = {f.file_path for f in change.remove} | thinned
    for snapshot in _since(name, table, change.base):
        summary = snapshot.summary.additional_properties if snapshot.summary else {}
        same_rows = summary.get("lakehouse.kind") == COMPACTION  # they were there at the base, in the files it removed
        for manifest in snapshot.manifests(table.io):
            if manifest.added_snapshot_id != snapshot.snapshot_id:
                continue
            for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=False):
                if entry.snapshot_id != snapshot.snapshot_id:
                    continue  # carried over when manifests were merged
                file = entry.data_file
                if entry.status == ManifestEntryStatus.DELETED and file.file_path in planned:
                    raise Replan(f"{name}: a file that the rewrite planned on was replaced meanwhile; plan again")
                if entry.status == ManifestEntryStatus.ADDED and not same_rows and _in_scope(file, change.scope):
                    raise Replan(f"{name}: files were added in the rewrite's scope since its base; plan again")


def _in_scope(file: DataFile, scope: Scope) -> bool:
    """Whether a file lies in the scope. One written under another partition spec might, so it does, unless there is no scope."""
    if scope == "table" or not scope:
        return bool(scope)
    return (file.spec_id, file.partition) in scope or file.spec_id not in {spec for spec, _ in scope}


def _since(name: str, table: Table, base: int) -> list[Snapshot]:
    """The snapshots after `base` up to the current one."""
    found: list[Snapshot] = []
    snapshot = table.current_snapshot()
    while snapshot is not None and snapshot.snapshot_id != base:
        found.append(snapshot)
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    if snapshot is None:
        raise Replan(f"{name}: the base snapshot of the rewrite has expired, or is no longer in the table's history; plan again")
    return found
