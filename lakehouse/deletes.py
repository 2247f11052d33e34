"""Rows leave a data file without the file being written again: a position delete file beside it says which (Iceberg, format 2).

Every reader of Iceberg takes them into account (`files_sql` here; DuckDB, pyiceberg, Polars, Spark, Trino, Snowflake), and pays
for it: so a file of which more than a few rows go is written again without them. Each delete file is about one data file, and
names all that is deleted of it: of a data file there is never more than one. The commit path (lakehouse/commit.py) sees to it
that no data file comes back without what was deleted of it, and that nothing is deleted of a file that is gone.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table import Table

from lakehouse.live import PATH_ID, POS_ID, LiveFile, deleted_rows, deletes_of
from lakehouse.outages import reaching
from lakehouse.plans import Plan, frame, live_files, other_rows
from lakehouse.queries import POSITION, path_for_duckdb, positions_sql

SPARSE = 20
"""A file loses rows to a delete file until one in so many is gone; then it is written again."""

SMALL = 1024 * 1024
"""Bytes: a smaller file is written again whatever goes, which costs little, and so the files of small batches do not pile up."""

AT_ONCE = 8
"""Delete files that are written at the same time: they are small, and an object store answers each in its own time."""

SCHEMA = pa.schema(
    [
        pa.field("file_path", pa.string(), nullable=False, metadata={"PARQUET:field_id": str(PATH_ID)}),
        pa.field("pos", pa.int64(), nullable=False, metadata={"PARQUET:field_id": str(POS_ID)}),
    ]
)
"""Of a position delete file, with the names and field ids that the Iceberg specification gives ("Position Delete Files")."""


def take_out(plan: Plan, gone: pl.DataFrame) -> tuple[list[DataFile], list[DataFile], pa.Table | None]:
    """Take rows out of the table that the plan began with, by a delete file or by writing their file again.

    gone: the rows, with the columns of the primary key, `filename` and `file_row_number` (see `files_sql`).

    Returns:
        The files to add (position delete files), those to remove (data files written again; delete files that were replaced),
        and the rows that are left of the data files removed, None if there is none.
    """
    if gone.is_empty():
        return [], [], None
    by_path = {path_for_duckdb(f.file_path): f for f in live_files(plan, AlwaysTrue())}
    found = {by_path[str(path)]: part[POSITION] for (path,), part in gone.group_by("filename", maintain_order=True)}
    few = {f: places for f, places in found.items() if f.file_size_in_bytes >= SMALL and _sparse(f, len(places))}
    again = [f for f in found if f not in few]
    add = write_deletes(plan.table, {f: _with_known(plan, f, places) for f, places in few.items()})
    replaced = [d for f in few for d in deletes_of(f)]
    if not again:
        return add, replaced, None
    keys = plan.declared.primary_key
    plan.connection.register("__gone", gone.select(keys).to_arrow())
    return add, [*again, *replaced], other_rows(plan, again, "__gone", ", ".join(f'"{c}"' for c in keys))


def _sparse(file: LiveFile, more: int) -> bool:
    """Whether few rows of a file are gone when that many more are."""
    return (deleted_rows(file) + more) * SPARSE <= file.record_count


def _with_known(plan: Plan, file: LiveFile, places: pl.Series) -> pl.Series:
    """The places in a file, with those deleted before, in order."""
    if file.deletes:
        known = frame(plan.connection, f"SELECT {POSITION} FROM {positions_sql(d.file_path for d in file.deletes)}")
        places = pl.concat([places, known[POSITION]])
    return places.unique().sort()


def write_deletes(table: Table, places: Mapping[LiveFile, pl.Series]) -> list[DataFile]:
    """A position delete file for each data file; they belong to no snapshot until a commit names them.

    Raises:
        Retryable: the object store failed. Terminal: it refuses.
    """
    name = uuid.uuid4()

    def write(number: int, file: LiveFile) -> DataFile:
        deleted = places[file].to_arrow().cast(pa.int64())
        rows = pa.table([pa.array([file.file_path] * len(deleted), pa.string()), deleted], schema=SCHEMA)
        path = table.location_provider().new_data_location(f"{number:05d}-{name}-deletes.parquet")
        with table.io.new_output(path).create() as stream:
            pq.write_table(rows, stream, compression="zstd")
            size = stream.tell()
        bound = {PATH_ID: file.file_path.encode()}
        written = DataFile.from_args(
            content=DataFileContent.POSITION_DELETES,
            file_path=path,
            file_format=FileFormat.PARQUET,
            partition=file.partition,
            record_count=len(deleted),
            file_size_in_bytes=size,
            lower_bounds=bound,  # whole, and the same: so readers see which file it is about
            upper_bounds=bound,
        )
        written.spec_id = file.spec_id
        return written

    with reaching(f"{'.'.join(table.name())}: writing delete files to {table.location()}"), ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(write, range(len(places)), places))
