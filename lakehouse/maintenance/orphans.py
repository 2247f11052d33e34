"""Orphans: files below a table that no snapshot names: what a killed job, a conflict or a lost answer left behind.

Whether a file is one cannot be seen from the file: it may be staged for a commit that is under way, or sent and unanswered.
So the table is told first, by a commit of its own, that files modified before a certain time are taken (`SWEPT`). That moves
`main`: a commit that was under way is refused by the catalog, looks again, and stages such files anew. Then the files that
no snapshot names *after* that commit are removed. So it is right with any guard; the guard spares work, and readers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

import duckdb
import pyarrow as pa
from pyiceberg.manifest import ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.update import SetPropertiesUpdate

from lakehouse.commit import SWEPT, Change, commit
from lakehouse.errors import Terminal
from lakehouse.files import list_files, remove_files, store_path
from lakehouse.lake import Run
from lakehouse.maintenance.expire import EXPIRED_FOLDER
from lakehouse.queries import connect
from lakehouse.settings import Settings

AT_ONCE = 50_000
SCHEMA = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("modified", pa.int64())])


def remove_orphans(
    table: Table, run: Run, settings: Settings, guard_ms: int, now_ms: int | None = None, *, dry_run: bool = False
) -> tuple[int, int]:
    """Remove the orphans modified longer than the guard ago; returns (files, bytes).

    Names are compared in DuckDB, within its memory limit: a table has millions of files.

    Raises:
        Terminal: the listing shows none of the files that the table names: it is not a listing of this table.
    """
    before = (int(time.time() * 1000) if now_ms is None else now_ms) - guard_ms
    with connect(settings) as connection:
        _keep(connection, "listed", _listed(table, before))
        if not _unnamed(connection, table):
            return 0, 0
        if not dry_run:
            name, sweep = ".".join(table.name()), SetPropertiesUpdate(updates={SWEPT: str(before)})
            commit(table, run, Change(name, {}, {}, updates=[sweep], note={"kind": "orphans", "before": str(before)}))
        orphans = _unnamed(connection, table)
    if not dry_run:
        remove_files(table.io, [_location(table, path) for path, _ in orphans])
    return len(orphans), sum(size for _, size in orphans)


def _listed(table: Table, before: int) -> Iterator[Mapping[str, object]]:
    """The files below the table's location; those of expiry's own records wait for their time there."""
    own = store_path(f"{table.metadata.location}/{EXPIRED_FOLDER}/")
    for path, size, modified in list_files(table.io, table.metadata.location):
        if not path.startswith(own):
            yield {"path": path, "bytes": size, "modified": modified if modified < before else None}


def _named(table: Table) -> Iterator[Mapping[str, object]]:
    """Every file that a snapshot of the table names, and the table's own: metadata, manifest lists, manifests, data."""
    metadata = table.metadata
    paths = [table.metadata_location, *(m.metadata_file for m in metadata.metadata_log)]
    paths += [s.statistics_path for s in (*metadata.statistics, *metadata.partition_statistics)]
    manifests: dict[str, ManifestFile] = {}
    for snapshot in metadata.snapshots:
        paths.append(snapshot.manifest_list)
        manifests |= {m.manifest_path: m for m in snapshot.manifests(table.io)}
    yield from ({"path": store_path(p)} for p in (*paths, *manifests))
    for manifest in manifests.values():
        yield from ({"path": store_path(e.data_file.file_path)} for e in manifest.fetch_manifest_entry(table.io))


def _unnamed(connection: duckdb.DuckDBPyConnection, table: Table) -> list[tuple[str, int]]:
    """(path, bytes) of the listed files, older than the guard, that nothing names as the table stands now."""
    _keep(connection, "named", _named(table))
    if not connection.execute("SELECT count(*) FROM listed SEMI JOIN named USING (path)").fetchall()[0][0]:
        raise Terminal(
            f"{'.'.join(table.name())}: nothing that the table names is listed below {table.metadata.location}: "
            "the store shows another place, nothing was removed; see: lakehouse settings"
        )
    query = "SELECT path, bytes FROM listed ANTI JOIN named USING (path) WHERE modified IS NOT NULL ORDER BY path"
    return connection.execute(query).fetchall()


def _keep(connection: duckdb.DuckDBPyConnection, name: str, rows: Iterable[Mapping[str, object]]) -> None:
    """Bring rows into a table of the connection, some at a time."""
    connection.execute(f"CREATE OR REPLACE TABLE {name} (path VARCHAR, bytes BIGINT, modified BIGINT)")
    batch: list[Mapping[str, object]] = []

    def flush() -> None:
        connection.register("__batch", pa.Table.from_pylist(batch, SCHEMA))
        connection.execute(f"INSERT INTO {name} FROM __batch")
        connection.unregister("__batch")
        batch.clear()

    for row in rows:
        batch.append(row)
        if len(batch) == AT_ONCE:
            flush()
    flush()


def _location(table: Table, path: str) -> str:
    """A store path as a location of the table's store."""
    scheme, found, _ = table.metadata.location.partition("://")
    return f"{scheme}://{path}" if found else path
