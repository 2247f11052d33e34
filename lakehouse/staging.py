"""Staging: rows become Parquet files before any commit, once; a conflict commits the same files again."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io import OutputStream
from pyiceberg.io.pyarrow import (
    MetricModeTypes,
    MetricsMode,
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
    schema_to_pyarrow,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table, TableProperties
from pyiceberg.typedef import Record
from pyiceberg.types import BinaryType, TimestamptzType

from lakehouse.declarations import Declaration
from lakehouse.errors import ChecksFailed, Terminal
from lakehouse.outages import reaching

ROW_GROUP_BYTES = 32 * 2**20
"""Arrow bytes of a row group: what a reader has to hold, and what a writer holds back until it is full."""

LARGEST_ROW_GROUP = 1_048_576
"""Rows, where the declaration says no less: narrow tables would get row groups of many millions, in which nothing is pruned."""

IN_PARALLEL = 100_000
"""Rows from which on partitions are sorted and encoded in two threads."""

Part = tuple[PartitionKey | None, pa.Table]
"""A partition and its rows."""

Place = tuple[PartitionKey | None, pl.Series]
"""A partition and which rows lie in it."""

MOST_OPEN_FILES = 32
"""Each takes a writer 1.3 MB of memory, and upload buffers besides; a batch of odd times touches thousands of partitions."""


def conform(table: Table, rows: pa.Table) -> pa.Table:
    """`rows` with exactly the table's columns, order and types; a column that is absent becomes NULL.

    Raises:
        Terminal: a column is not in the table, or a value does not fit its type.
    """
    schema = schema_to_pyarrow(table.schema(), include_field_ids=False)
    if unknown := sorted(set(rows.column_names) - set(schema.names)):
        raise Terminal(f"{'.'.join(table.name())}: column {unknown[0]!r} is not declared")
    columns = []
    for field in schema:
        if field.name not in rows.column_names:
            columns.append(pa.nulls(rows.num_rows, field.type))
            continue
        try:
            columns.append(rows.column(field.name).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise Terminal(
                f"{'.'.join(table.name())}: column {field.name!r} does not fit {field.type}: {type(error).__name__}"
            ) from None
    # whether a required field holds NULL is for `refuse_nulls` to say: transforms conform rows that they only pass on
    return pa.table(columns, schema=pa.schema([f.with_nullable(True) for f in schema]))


def stage(table: Table, declared: Declaration, rows: pa.Table | pl.DataFrame) -> list[DataFile]:
    """Write `rows`, sorted by the declared order, as Parquet files of the table, one or more for each partition touched.

    Nothing is published: the files belong to no snapshot until a commit names them. A frame has all columns of the table.

    Raises:
        ChecksFailed: a required column holds NULL: Parquet cannot hold that, so it cannot wait for `check_staged`.
        Retryable: the object store failed. Terminal: it refuses; and see `conform`.
    """
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(conform(table, rows))
    if frame.is_empty():
        return []
    given = frame.to_arrow(compat_level=pl.CompatLevel.newest())  # the same memory
    refuse_nulls(table, declared, given)
    places = sorted(_places(table, given), key=lambda place: len(place[1]))
    shares = [places[0::2], places[1::2]] if frame.height >= IN_PARALLEL and len(places) > 1 else [places]
    writers = [OpenFiles(table, declared) for _ in shares]

    def write(files: OpenFiles, share: Sequence[Place]) -> list[DataFile]:
        for key, at in share:
            files.write_partition(key, conform(table, _in_order(frame, at, declared.sort).to_arrow()))
        return files.close()

    try:
        if len(shares) == 1:
            return write(writers[0], shares[0])
        with ThreadPoolExecutor(len(shares)) as pool:  # sorting and encoding leave Python's lock alone
            return [file for files in pool.map(write, writers, shares) for file in files]
    except BaseException:
        for files in writers:
            files.abandon()
        raise


def _in_order(frame: pl.DataFrame, at: pl.Series, by: Sequence[str]) -> pl.DataFrame:
    """The rows at these places, in ascending order of the columns, NULL last; of equal ones the first comes first.

    Polars moves 16 bytes of a text, whatever its length, and finds the order of texts in a third of Arrow's time.
    """
    if by:
        order = frame.select(pl.col(by).gather(at)).select(pl.arg_sort_by(by, nulls_last=True, maintain_order=True)).to_series()
        at = at.gather(order)
    return frame[at]


def refuse_nulls(table: Table, declared: Declaration, rows: pa.Table) -> None:
    """Raise ChecksFailed if a required column holds NULL."""
    required = [f.name for f in table.schema().fields if f.required]
    if missing := [f"not_null({c}): {n} rows" for c in required if (n := rows.column(c).null_count)]:
        raise ChecksFailed(
            f"{declared.table}: the batch was held, nothing was committed: {'; '.join(missing)}. Rules: {declared.path}"
        )


@dataclass
class _Open:
    """One file that is being written."""

    path: str
    partition: Record
    stream: OutputStream
    parquet: pq.ParquetWriter


class OpenFiles:
    """Parquet files that are written while rows still come: one for each partition touched, and a new one at the target size.

    Of more than MOST_OPEN_FILES partitions the one that got no rows for longest is closed: the next gets a file of its own.
    The files belong to no snapshot. Not for two threads at once.

    Args:
        sorted_whole: each file's rows come in the declared order from its first to its last, which its manifest then says;
            otherwise they are sorted within each row group.
    """

    def __init__(self, table: Table, declared: Declaration, *, sorted_whole: bool = False) -> None:
        self._table, self._declared = table, declared
        self._schema = schema_to_pyarrow(table.schema())
        self._paths = parquet_path_to_id_mapping(table.schema())
        binary = {f.name for f in table.schema().fields if isinstance(f.field_type, BinaryType)}
        restricted = {c.name for c in declared.columns if c.pii == "restricted"}
        # Bounds of a payload prune nothing, and bounds of restricted columns would stand in manifests, which nobody masks.
        self._bounded = [f.name for f in table.schema().fields if f.field_type.is_primitive and f.name not in binary | restricted]
        differing = {f.name for f in table.schema().fields if isinstance(f.field_type, TimestamptzType) or f.name == "offset"}
        properties = table.metadata.properties
        self._parquet: dict[str, Any] = {
            "compression": properties.get(TableProperties.PARQUET_COMPRESSION, TableProperties.PARQUET_COMPRESSION_DEFAULT),
            "compression_level": int(properties.get(TableProperties.PARQUET_COMPRESSION_LEVEL, "1")),
            "write_statistics": self._bounded,
            # payloads do not repeat; nor do times and offsets, of which neighbours differ by little
            "use_dictionary": [path for path in self._paths if path not in binary | differing],
            "column_encoding": dict.fromkeys(differing, "DELTA_BINARY_PACKED"),
            "store_decimal_as_integer": True,
        }
        bounded = {table.schema().find_field(name).field_id for name in self._bounded}
        self._plan = {
            number: column if number in bounded else replace(column, mode=MetricsMode(MetricModeTypes.NONE))
            for number, column in compute_statistics_plan(table.schema(), properties).items()
        }
        self._target = int(
            properties.get(TableProperties.WRITE_TARGET_FILE_SIZE_BYTES, TableProperties.WRITE_TARGET_FILE_SIZE_BYTES_DEFAULT)
        )
        self._sort_order_id = table.sort_order().order_id if sorted_whole else None
        self._name, self._count = uuid.uuid4(), itertools.count()
        self._open: dict[str, _Open] = {}
        self._done: list[DataFile] = []

    def write(self, rows: pa.Table) -> None:
        """Append rows (conformed, no NULL where one is required) as row groups, in the order they have.

        Raises:
            Retryable: the object store failed. Terminal: it refuses.
        """
        with self._reaching():
            per_group = self._rows_per_group(rows)
            for key, part in _by_partition(self._table, rows):
                self._append(key, part, per_group)

    def write_partition(self, key: PartitionKey | None, rows: pa.Table) -> None:
        """The same, of rows that all lie in one partition."""
        with self._reaching():
            self._append(key, rows, self._rows_per_group(rows))

    def _rows_per_group(self, rows: pa.Table) -> int:
        largest = self._declared.row_group_rows or LARGEST_ROW_GROUP
        fitting: int = ROW_GROUP_BYTES * rows.num_rows // max(1, rows.nbytes)
        return max(1, min(largest, fitting))

    def _append(self, key: PartitionKey | None, rows: pa.Table, per_group: int) -> None:
        rows = pa.table(rows.columns, schema=self._schema)  # with field ids, and NULL only where it may be
        place = key.to_path() if key else ""
        for start in range(0, rows.num_rows, per_group):
            file = self._file(place, key)
            file.parquet.write_table(rows.slice(start, per_group), row_group_size=per_group)
            if file.stream.tell() >= self._target:
                self._close(place)

    def _reaching(self) -> AbstractContextManager[None]:
        return reaching(f"{self._declared.table}: writing data files to {self._table.location()}")

    def _file(self, place: str, key: PartitionKey | None) -> _Open:
        """The open file of a partition, now the last in the order in which files got rows."""
        if place not in self._open:
            if len(self._open) >= MOST_OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[place] = self._create(key)
        file = self._open[place] = self._open.pop(place)
        return file

    def close(self) -> list[DataFile]:
        """End all files; they are complete, and still belong to no snapshot."""
        with self._reaching():
            for place in list(self._open):
                self._close(place)
        return self._done

    def abandon(self) -> None:
        """Remove what was written. Only for files that no attempt of a commit has named."""
        for file in self._open.values():
            with contextlib.suppress(Exception):
                file.parquet.close()
            with contextlib.suppress(Exception):
                file.stream.close()
        for path in [*(f.path for f in self._open.values()), *(f.file_path for f in self._done)]:
            with contextlib.suppress(Exception):  # what stays is an orphan, which maintenance removes
                self._table.io.delete(path)
        self._open, self._done = {}, []

    def _create(self, key: PartitionKey | None) -> _Open:
        name = f"{next(self._count):05d}-{self._name}.parquet"
        path = self._table.location_provider().new_data_location(name, key)
        stream = self._table.io.new_output(path).create()
        parquet = pq.ParquetWriter(stream, self._schema, **self._parquet)
        return _Open(path, key.partition if key else Record(), stream, parquet)

    def _close(self, place: str) -> None:
        file = self._open[place]
        file.parquet.close()
        size = file.stream.tell()
        file.stream.close()
        del self._open[place]
        statistics = data_file_statistics_from_parquet_metadata(file.parquet.writer.metadata, self._plan, self._paths)
        data_file = DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=file.path,
            file_format=FileFormat.PARQUET,
            partition=file.partition,
            file_size_in_bytes=size,
            sort_order_id=self._sort_order_id,
            spec_id=self._table.spec().spec_id,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )
        data_file.spec_id = self._table.spec().spec_id  # what `from_args` is given is for the manifest alone
        self._done.append(data_file)


def _by_partition(table: Table, rows: pa.Table) -> Iterator[Part]:
    """The rows of each partition of the table's present spec, in the order they have; untouched if there is but one."""
    places = _places(table, rows)
    for key, at in places:
        yield key, rows if len(places) == 1 else rows.take(at.to_arrow())


def _places(table: Table, rows: pa.Table) -> list[Place]:
    """The partitions of the table's present spec that the rows fall in, and which rows do, in the order they have."""
    spec, schema = table.spec(), table.schema()
    if spec.is_unpartitioned():
        return [(None, pl.arange(rows.num_rows, dtype=pl.UInt32, eager=True))]
    values = {}
    for number, field in enumerate(spec.fields):
        source = schema.find_field(field.source_id)
        column = rows.column(source.name).cast(schema_to_pyarrow(source.field_type))
        values[str(number)] = field.transform.pyarrow_transform(source.field_type)(column)
    found = pl.DataFrame(pa.table(values)).with_row_index("at").group_by(list(values), maintain_order=True).agg("at")
    keys = (
        PartitionKey([PartitionFieldValue(f, v) for f, v in zip(spec.fields, place, strict=True)], spec, schema)
        for place in found.drop("at").iter_rows()
    )
    return list(zip(keys, found["at"], strict=True))
