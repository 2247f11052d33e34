"""Expiry: old snapshots leave the metadata at once, the files that they alone named some time later.

Two steps, because two things want different ages. Every commit copies the metadata, so snapshots must be few; a reader works
on from the snapshot that it has loaded, so files must stay. The files are written down (`data/expired/*.parquet`: a table
bucket refuses any other kind of file, and any other place) before the snapshots go, so that a killed run is finished by the
next one.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.manifest import ManifestEntryStatus, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import AssertRefSnapshotId, AssertTableUUID, RemoveSnapshotsUpdate, SetPropertiesUpdate

from lakehouse.declarations import KeepSnapshots
from lakehouse.files import list_files, remove_files
from lakehouse.lake import Run, history
from lakehouse.positions import refuse_rolled_back
from lakehouse.publish import Request, publish

EXPIRED = "lakehouse.expired"
"""Table property: what the last expiry did, and the names of the records of expired files that wait for their removal."""

EXPIRED_FOLDER = "data/expired"
"""Where, below a table's location, expired files are written down."""

DAY_MS = 86_400_000
OFF_MAIN_DAYS = 3
"""Snapshots that no branch goes back to (rolled back, staged) stay this long: a writer that lost its answer looks for them."""

MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class Expiry:
    """What expiring does to a table: the snapshots that go, and the files that they alone name (data, manifests, lists)."""

    snapshots: list[int] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """In the order of removal: what names a file goes after the file, so that a run that was killed is found unfinished."""
        return [*self.data, *self.manifests, *self.lists]


def to_expire(metadata: TableMetadata, keep: KeepSnapshots, needed: Collection[int], now_ms: int) -> list[Snapshot]:
    """The snapshots that may go, oldest first: not kept by the policy, by a tag or branch, or by a reader that `needed` names."""
    by_id = {s.snapshot_id: s for s in metadata.snapshots}
    main = _chain(metadata.current_snapshot(), by_id)
    kept = {*needed}
    for place, snapshot in enumerate(main):
        young = now_ms - snapshot.timestamp_ms <= keep.days * DAY_MS
        if place < keep.at_least or (place < keep.at_most and young):
            kept.add(snapshot.snapshot_id)
    on_main = {s.snapshot_id for s in main}
    for ref in metadata.refs.values():
        kept.add(ref.snapshot_id)
        if ref.snapshot_ref_type == "branch":  # with what it has of its own
            kept |= {s.snapshot_id for s in _chain(by_id.get(ref.snapshot_id), by_id)} - on_main
    kept |= {
        s.snapshot_id
        for s in metadata.snapshots
        if s.snapshot_id not in on_main and now_ms - s.timestamp_ms <= OFF_MAIN_DAYS * DAY_MS
    }
    return sorted((s for s in metadata.snapshots if s.snapshot_id not in kept), key=lambda s: s.sequence_number or 0)


def _chain(snapshot: Snapshot | None, by_id: dict[int, Snapshot]) -> list[Snapshot]:
    """A snapshot and what it goes back to, as far as that is kept."""
    found = []
    while snapshot is not None:
        found.append(snapshot)
        snapshot = by_id.get(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id is not None else None
    return found


def plan_expiry(table: Table, keep: KeepSnapshots, needed: Collection[int], now_ms: int) -> Expiry:
    """Which snapshots go, and which files go with them. Reads what those snapshots wrote, not what the table holds.

    A data file that snapshot r of `main` removed, and that an older one a had added, is named by the snapshots from a up to
    and without r. It goes when none of these is left. What was only ever on a snapshot off `main` is left to orphan removal.
    """
    leaving = to_expire(table.metadata, keep, needed, now_ms)
    gone = {s.snapshot_id for s in leaving}
    main = history(table)[::-1]
    on_main = {s.snapshot_id for s in main}
    staying = [s for s in table.metadata.snapshots if s.snapshot_id not in gone]
    expired = [s for s in main if s.snapshot_id in gone]
    if not expired:
        return Expiry([s.snapshot_id for s in leaving])
    # a manifest that a snapshot dropped does not come back after it: of the newest ones, kept without a gap, the oldest
    # speaks for all
    newest = {s.snapshot_id for s in itertools.takewhile(lambda s: s.snapshot_id not in gone, reversed(main))}
    oldest = next(s for s in main if s.snapshot_id in newest)
    witnesses = [oldest, *(s for s in staying if s.snapshot_id not in newest)]
    named = {m.manifest_path for s in witnesses for m in s.manifests(table.io)}
    data: dict[str, None] = {}
    manifests: dict[str, None] = {}
    for before, after in itertools.pairwise(main):
        if before.snapshot_id not in gone:
            continue
        manifests |= dict.fromkeys(m.manifest_path for m in before.manifests(table.io) if m.manifest_path not in named)
        removed_at = after.sequence_number or 0
        for path, added_at in _removed_by(table, after):
            if not any(
                added_at <= (s.sequence_number or 0) and (s.snapshot_id not in on_main or (s.sequence_number or 0) < removed_at)
                for s in staying
            ):
                data[path] = None
    return Expiry([s.snapshot_id for s in leaving], [*data], [*manifests], [s.manifest_list for s in expired])


def _removed_by(table: Table, snapshot: Snapshot) -> Iterator[tuple[str, int]]:
    """(path, sequence number it was added at) of each file that a snapshot removed."""
    for manifest in snapshot.manifests(table.io):
        if manifest.added_snapshot_id == snapshot.snapshot_id and _deletes(manifest):
            for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=False):
                if entry.status == ManifestEntryStatus.DELETED and entry.snapshot_id == snapshot.snapshot_id:
                    yield entry.data_file.file_path, entry.file_sequence_number or 0


def _deletes(manifest: ManifestFile) -> bool:
    return manifest.deleted_files_count is None or manifest.deleted_files_count > 0


def expire(table: Table, run: Run, keep: KeepSnapshots, needed: Collection[int], now_ms: int | None = None) -> Expiry:
    """Take the snapshots that may go out of the metadata, and write down which files go with them.

    The commit requires that every branch and tag is where it was when this was decided; so does the one that makes a tag
    (lakehouse/maintenance/tags.py), and they exclude each other.

    Raises:
        RolledBack: the table was rolled back without its positions: expiry would hide it.
        CommitUnresolved: other commits came first each time, or the catalog stayed away; again is harmless.
    """
    name, record = ".".join(table.name()), f"{uuid.uuid4()}.parquet"
    planned = Expiry()

    def build() -> Request | None:
        nonlocal planned
        refuse_rolled_back(name, table.metadata)
        now = int(time.time() * 1000) if now_ms is None else now_ms
        planned = plan_expiry(table, keep, needed, now)
        if not planned.snapshots:
            return None
        _write_down(table, record, now, planned.files)
        waiting = [*(r for r in _waiting(table) if r in {n for n, _ in _records(table)}), record]
        done = {"run": run.run_id, "at": now, "snapshots": len(planned.snapshots), "waiting": waiting}
        removal = RemoveSnapshotsUpdate(snapshot_ids=planned.snapshots)  # type: ignore[call-arg]
        refs = [
            AssertRefSnapshotId(ref=ref, snapshot_id=at.snapshot_id)  # type: ignore[call-arg]
            for ref, at in table.metadata.refs.items()
        ]
        said = SetPropertiesUpdate(updates={EXPIRED: json.dumps(done)})
        return (removal, said), (AssertTableUUID(uuid=table.metadata.table_uuid), *refs)

    publish(table, build, lambda: record in _waiting(table), MAX_ATTEMPTS)
    return planned


def remove_expired_files(table: Table, min_age_ms: int, now_ms: int | None = None, *, dry_run: bool = False) -> int:
    """Remove the files of snapshots that expired long enough ago; returns how many. Again is harmless.

    Only records that the table names count: their expiry has landed. A file written down there is named by no snapshot that is
    left, and cannot come back: a table rolls back to snapshots that it has, and a writer that would commit the file again is
    fenced, since positions have gone on.
    """
    now = int(time.time() * 1000) if now_ms is None else now_ms
    landed, removed = _waiting(table), 0
    for name, modified in _records(table):
        location = f"{_folder(table)}/{name}"
        if name not in landed:
            if now - modified > OFF_MAIN_DAYS * DAY_MS and not dry_run:
                remove_files(table.io, [location])
            continue
        expired_at, files = _read(table, location)
        if now - expired_at < min_age_ms:
            continue
        if dry_run:
            removed += len(files)
            continue
        removed += remove_files(table.io, files)
        remove_files(table.io, [location])
    return removed


def _waiting(table: Table) -> list[str]:
    """The records whose expiry has landed; some of them may be done with."""
    return list(json.loads(table.properties.get(EXPIRED, "{}")).get("waiting", []))


def _write_down(table: Table, record: str, now: int, files: Sequence[str]) -> None:
    """A record of expired files, over the one of an earlier attempt."""
    rows = pa.table({"path": pa.array(files, pa.string()), "expired_at_ms": pa.array([now] * len(files), pa.int64())})
    with table.io.new_output(f"{_folder(table)}/{record}").create(overwrite=True) as stream:
        pq.write_table(rows, stream)


def _read(table: Table, location: str) -> tuple[int, list[str]]:
    """When the files of a record expired, and their paths; 0 and nothing if it names none."""
    with table.io.new_input(location).open() as stream:
        rows = pq.read_table(stream)
    return (rows["expired_at_ms"][0].as_py() if rows.num_rows else 0), rows["path"].to_pylist()


def _records(table: Table) -> list[tuple[str, int]]:
    """(name, modified ms) of the records that are there."""
    return [(path.rsplit("/", 1)[1], modified) for path, _, modified in list_files(table.io, _folder(table))]


def _folder(table: Table) -> str:
    """Where expired files are written down."""
    return f"{table.metadata.location}/{EXPIRED_FOLDER}"
