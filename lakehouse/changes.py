"""What changed in a table between two of its snapshots: the rows that only one of them has.

Found by files: only manifests and data files that not both snapshots have are read, so it costs what was written between them
and not what the table holds. Files that were compacted in between hold the same rows, and cancel out.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyiceberg.manifest import ManifestFile
from pyiceberg.table import Table

from lakehouse.queries import files_sql


def changed_files(table: Table, before: int | None, after: int | None) -> tuple[list[str], list[str]]:
    """Paths of the data files that only the snapshot `after` has, and of those that only `before` has. None: a table that held
    nothing.

    Raises:
        KeyError: a snapshot is not kept any more.
    """
    manifests = [_manifests(table, snapshot) for snapshot in (before, after)]
    paths = []
    for own, other in (manifests, manifests[::-1]):
        entries = (e for path in own.keys() - other.keys() for e in own[path].fetch_manifest_entry(table.io))
        paths.append({e.data_file.file_path for e in entries})
    return sorted(paths[1] - paths[0]), sorted(paths[0] - paths[1])


def _manifests(table: Table, snapshot_id: int | None) -> dict[str, ManifestFile]:
    if snapshot_id is None:
        return {}
    snapshot = table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        raise KeyError(snapshot_id)
    return {m.manifest_path: m for m in snapshot.manifests(table.io)}


def changed_rows_sql(table: Table, before: int | None, after: int | None, columns: Sequence[str]) -> str | None:
    """The rows that only one of two snapshots has, as an SQL table expression with these columns; None if no file differs.

    Rows are compared in these columns alone, with how often they are there. Raises as `changed_files`.
    """
    added, removed = changed_files(table, before, after)
    chosen = ", ".join(f'"{c}"' for c in columns)
    if not (added and removed):
        return f"(SELECT {chosen} FROM {files_sql(table, added or removed)})" if added or removed else None
    sides = " UNION ALL ".join(
        f"SELECT {chosen}, {sign} AS __side FROM {files_sql(table, paths)}" for sign, paths in ((1, added), (-1, removed))
    )
    return f"(SELECT {chosen} FROM ({sides}) GROUP BY {chosen} HAVING sum(__side) <> 0)"
