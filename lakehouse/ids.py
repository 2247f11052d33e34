"""Which data files hold an id: the sorted hashes of a file's ids, beside what decides between copies of a record.

The index of a file is a derivative of that file, which never changes. It is kept in a local cache under the file's path and
made again when it is missing: so it cannot be wrong, takes part in no commit, and survives compaction, rollback and a lost disk.
A probe for few ids costs them times the logarithm of a file's rows (the index is mapped, not read); of many, one pass over the
index leaves those alone to be searched that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.queries import fetch, files_sql

UNUSED_SECONDS = 35 * 86_400
"""An index that nobody asked for that long is removed: its file is older than any window that is deduplicated."""

SEARCHES = 4
"""So many searches of an index cost as much as reading a part of it, a set of which tells for each id whether it is there."""


def id_index(
    connection: duckdb.DuckDBPyConnection, folder: Path, table: Table, file: DataFile, columns: Mapping[str, str]
) -> pl.DataFrame:
    """The index of one data file, sorted by its first column.

    Args:
        columns: {name: SQL expression over the table's columns}; the first is the hash of the id. Fixed-width types only.
    """
    # the hash function is DuckDB's own and may change with its version
    named = [f"{sql} AS {name}" for name, sql in columns.items()]
    name = hashlib.sha256("\0".join([duckdb.__version__, *named, file.file_path]).encode()).hexdigest()[:40]
    path = folder / f"{name}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if found.num_rows == file.record_count:
            os.utime(path)
            return pl.DataFrame(found)
    made = fetch(connection, f"SELECT {', '.join(named)} FROM {files_sql(table, [file])} ORDER BY 1")
    made = made.combine_chunks()
    folder.mkdir(parents=True, exist_ok=True)
    _forget_unused(folder)
    part = path.with_suffix(f".{os.getpid()}.part")
    with pa.OSFile(str(part), "wb") as out, pa.ipc.new_file(out, made.schema) as writer:
        writer.write_table(made)
    part.replace(path)  # whole or not at all: another process may be making the same one
    return pl.DataFrame(made)


def probe(index: pl.DataFrame, ids: pl.Series) -> pl.DataFrame:
    """Which of the ids (hashes) the index has: columns `at`, the place in `ids`, and those of the index but the first."""
    known = index.to_series(0)
    if known.is_empty() or ids.is_empty():
        return index.clear().select(pl.lit(0, pl.UInt32).alias("at"), pl.all().exclude(known.name))
    asked = pl.arange(len(ids), dtype=pl.get_index_type(), eager=True)
    if len(ids) * SEARCHES > len(known):
        asked = asked.filter(ids.is_in(known.implode()))
    places = known.search_sorted(ids.gather(asked), "left").clip(upper_bound=len(known) - 1)
    there = known.gather(places) == ids.gather(asked)
    return index[places.filter(there)].select(asked.filter(there).alias("at"), pl.all().exclude(known.name))


def probe_files(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    table: Table,
    asked: Sequence[tuple[DataFile, pl.Series]],
    columns: Mapping[str, str],
) -> list[pl.DataFrame]:
    """What `probe` finds in the index of each file of the ids asked of it; of several files at once."""

    def look(one: tuple[DataFile, pl.Series]) -> pl.DataFrame:
        file, ids = one
        with connection.cursor() as own:
            return probe(id_index(own, folder, table, file, columns), ids)

    with ThreadPoolExecutor(pl.thread_pool_size()) as pool:
        return list(pool.map(look, asked))


@cache
def _forget_unused(folder: Path) -> None:
    """Remove indexes that have not been asked for in a long time, and what a killed process left: once a process."""
    limit = time.time() - UNUSED_SECONDS
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime < limit:
                Path(entry.path).unlink()
