"""What changed in a table between two of its snapshots: the rows that only one of them has.

Found by files: only manifests, data files and delete files that not both snapshots have are read, so it costs what was written
between them and not what the table holds. Files that were compacted in between hold the same rows, and cancel out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pyiceberg.manifest import DataFile, ManifestContent
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from lakehouse.live import LiveFile, position_deletes
from lakehouse.queries import files_sql, rows_at_sql

Deletes = Mapping[str, tuple[DataFile, ...]]
"""The position delete files of a snapshot, by the path of the data file."""


@dataclass(frozen=True)
class _Side:
    """What one of two snapshots has that the other has not.

    files: data files. deletes: by the path of a data file that both have, the delete files that take other rows out of it here.
    """

    files: Sequence[LiveFile]
    deletes: Deletes


def changed_rows_sql(table: Table, before: int | None, after: int | None, columns: Sequence[str]) -> str | None:
    """The rows that only one of two snapshots has, as an SQL table expression with these columns; None if no file differs.

    Rows are compared in these columns alone, with how often they are there. None for a snapshot: a table that held nothing.

    Raises:
        KeyError: a snapshot is not kept any more.
    """
    old, new = _sides(table, _snapshot(table, before), _snapshot(table, after))
    parts = [*_rows(table, new, old, 1), *_rows(table, old, new, -1)]
    chosen = ", ".join(f'"{c}"' for c in columns)
    if len({sign for sign, _ in parts}) < 2:
        return f"({' UNION ALL '.join(f'SELECT {chosen} FROM {rows}' for _, rows in parts)})" if parts else None
    signed = " UNION ALL ".join(f"SELECT {chosen}, {sign} AS __side FROM {rows}" for sign, rows in parts)
    return f"(SELECT {chosen} FROM ({signed}) GROUP BY {chosen} HAVING sum(__side) <> 0)"


def _rows(table: Table, side: _Side, other: _Side, sign: int) -> Iterator[tuple[int, str]]:
    """The rows that `side` has and `other` has not: those of its own files, and those that only the other deletes."""
    if side.files:
        yield sign, files_sql(table, side.files)
    if other.deletes:
        kept = (file for path in other.deletes for file in side.deletes.get(path, ()))
        yield sign, rows_at_sql(table, other.deletes, (f for files in other.deletes.values() for f in files), kept)


def _sides(table: Table, *snapshots: Snapshot | None) -> tuple[_Side, _Side]:
    held = [{m.manifest_path: m for m in s.manifests(table.io)} if s else {} for s in snapshots]
    deletes = [position_deletes(table, s) if s else {} for s in snapshots]
    entries = [
        {
            entry.data_file.file_path: entry
            for path in own.keys() - other.keys()
            if own[path].content == ManifestContent.DATA
            for entry in own[path].fetch_manifest_entry(table.io)
        }
        for own, other in (held, held[::-1])
    ]

    def side(own: int, other: int) -> _Side:
        alone = sorted(entries[own].keys() - entries[other].keys())
        gone = {*alone, *(entries[other].keys() - entries[own].keys())}
        differing = {p: files for p, files in deletes[own].items() if p not in gone and files != deletes[other].get(p, ())}
        return _Side([LiveFile.of(entries[own][p], deletes[own].get(p, ())) for p in alone], differing)

    return side(0, 1), side(1, 0)


def _snapshot(table: Table, snapshot_id: int | None) -> Snapshot | None:
    if snapshot_id is None:
        return None
    snapshot = table.snapshot_by_id(snapshot_id)
    if snapshot is None:
        raise KeyError(snapshot_id)
    return snapshot
