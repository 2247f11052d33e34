"""Compaction: small files of a partition become few large ones in the declared order; the same rows, beside running writers.

Only what is worth it is rewritten: enough small files, or files that fill a large one, or the rest of a partition that gets no
more. Rows go through DuckDB's sort, which spills to disk, into Parquet files that are closed at the target size. The commit
asks nothing of what others did meanwhile except that the files it replaces are still there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import TypeAlias

import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, TableProperties
from pyiceberg.typedef import Record

from lakehouse.commit import COMPACTION, Change, commit
from lakehouse.declarations import Declaration
from lakehouse.errors import Replan, Terminal
from lakehouse.lake import Lake
from lakehouse.live import LiveFile, rows_left
from lakehouse.maintenance.planning import files_listed, time_partition
from lakehouse.predicates import at_least
from lakehouse.queries import connect, files_sql
from lakehouse.settings import Settings
from lakehouse.staging import LARGEST_ROW_GROUP, ROW_GROUP_BYTES, OpenFiles, conform

FULL = 0.75
"""A file (or a bin) of this part of the target size is large enough."""

SECONDS_BETWEEN_COMMITS = 60.0
FILES_BETWEEN_COMMITS = 200
ROWS_AT_ONCE = 2_048  # as few as DuckDB hands out: a row may be 1 MB
MAX_PLANS = 3

Bin: TypeAlias = list[DataFile]


def plan_compaction(table: Table, settings: Settings, now: datetime | None = None) -> list[Bin]:
    """The groups of files to be rewritten into one or more each; all of one partition, in the order they were added."""
    now = now or datetime.now(UTC)
    part = time_partition(table)
    since = now - timedelta(days=settings.compact_days)
    # of years there are few, and a late event puts a small file into any
    recent = at_least(part.column, part.value(since)) if part and part.transform != "year" else AlwaysTrue()
    made = {s.snapshot_id: s.timestamp_ms for s in table.metadata.snapshots}
    cold_ms = int((now - timedelta(minutes=settings.compact_cold_minutes)).timestamp() * 1000)
    target, spec = target_bytes(table), table.spec().spec_id
    small: dict[Record, list[LiveFile]] = {}
    hot: set[Record] = set()
    for file in files_listed(table, recent):
        if file.spec_id != spec:
            continue
        if made.get(file.added_by or 0, 0) > cold_ms:  # a snapshot that has expired is old
            hot.add(file.partition)
        if file.file_size_in_bytes < FULL * target:
            small.setdefault(file.partition, []).append(file)
    return [
        chosen
        for partition, files in small.items()
        for chosen in pack(sorted(files, key=attrgetter("sequence_number")), target)
        if worth_it(chosen, target, settings.compact_files, cold=partition not in hot)
    ]


def target_bytes(table: Table) -> int:
    """The size that data files should have."""
    name, default = TableProperties.WRITE_TARGET_FILE_SIZE_BYTES, TableProperties.WRITE_TARGET_FILE_SIZE_BYTES_DEFAULT
    return int(table.properties.get(name, default))


def pack(files: Sequence[DataFile], target: int) -> list[Bin]:
    """Neighbours together, up to the target size."""
    bins: list[Bin] = []
    filled = target
    for file in files:
        if filled + file.file_size_in_bytes > target:
            bins.append([])
            filled = 0
        bins[-1].append(file)
        filled += file.file_size_in_bytes
    return bins


def worth_it(files: Bin, target: int, enough: int, *, cold: bool) -> bool:
    """Whether to rewrite: a row is rewritten a few times in its life, not each time a small file comes beside it."""
    sizes = [f.file_size_in_bytes for f in files]
    if len(files) < 2:
        return False
    return sum(sizes) >= FULL * target or len(files) >= enough or (cold and max(sizes) <= FULL * sum(sizes))


def compact(lake: Lake, declared: Declaration, table: Table, say: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Rewrite what `plan_compaction` finds, a commit every minute or so, so that a stopped run loses no more than that.

    Raises:
        Replan: others replaced the files each time (a transform rewrites the same partitions); nothing is lost.
    """
    figures = {"files": 0, "into": 0, "rows": 0, "bytes": 0}
    for attempt in range(MAX_PLANS):
        table.refresh()
        bins = plan_compaction(table, lake.settings)
        try:
            _rewrite(lake, declared, table, bins, figures, say)
        except Replan:
            if attempt == MAX_PLANS - 1:
                raise
        else:
            break
    return figures


def _rewrite(
    lake: Lake, declared: Declaration, table: Table, bins: Sequence[Bin], figures: dict[str, int], say: Callable[[str], None]
) -> None:
    removed: list[DataFile] = []
    added: list[DataFile] = []
    began = time.monotonic()
    for number, files in enumerate(bins, 1):
        added += merge_files(lake, declared, table, files)
        removed += files
        late = time.monotonic() - began > SECONDS_BETWEEN_COMMITS
        if not (late or len(removed) >= FILES_BETWEEN_COMMITS or number == len(bins)):
            continue
        rows = sum(f.record_count for f in added)
        note = {"kind": COMPACTION, "compacted": f"{len(removed)} files into {len(added)}"}
        commit(
            table,
            lake.run,
            Change(declared.table, {}, {}, add=added, remove=removed, rewrite=True, scope=frozenset(), note=note),
        )
        for name, more in zip(figures, (len(removed), len(added), rows, sum(f.file_size_in_bytes for f in removed)), strict=True):
            figures[name] += more
        say(f"{declared.table}: compact, {figures['files']:,} files into {figures['into']:,}")
        removed, added, began = [], [], time.monotonic()


def merge_files(lake: Lake, declared: Declaration, table: Table, files: Sequence[DataFile]) -> list[DataFile]:
    """Write the rows of `files`, all of one partition and of the present spec, in the declared order; nothing is published.

    Raises:
        Terminal: another number of rows came out than went in.
    """
    columns = ", ".join(f'"{f.name}"' for f in table.schema().fields)
    order = ", ".join(f'"{c}" ASC NULLS FIRST' for c in declared.sort)
    source = files_sql(table, files)
    output = OpenFiles(table, declared, sorted_whole=True)
    try:
        with connect(lake.settings) as connection:
            found = connection.execute(f"SELECT {columns} FROM {source}" + (f" ORDER BY {order}" if order else ""))
            batches = found.to_arrow_reader(ROWS_AT_ONCE)
            for group in _groups(conform(table, pa.Table.from_batches([batch])) for batch in batches):
                output.write(group)
        written = output.close()
        came, went = sum(f.record_count for f in written), rows_left(files)
        if came != went:
            raise Terminal(f"{declared.table}: {went} rows went into a compaction and {came} came out; nothing was committed")
    except BaseException:
        output.abandon()  # no attempt of a commit has named its files
        raise
    return written


def _groups(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Batches together, as many as a row group may hold."""
    held: list[pa.Table] = []
    size = rows = 0
    for batch in batches:
        if held and (size + batch.nbytes > ROW_GROUP_BYTES or rows + batch.num_rows > LARGEST_ROW_GROUP):
            yield pa.concat_tables(held)
            held, size, rows = [], 0, 0
        held.append(batch)
        size, rows = size + batch.nbytes, rows + batch.num_rows
    if held:
        yield pa.concat_tables(held)
