"""Rows of a table by the values of one of its columns: which files can hold them, each asked for those alone that it can hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.transforms import BucketTransform

from lakehouse.live import CURRENT, LiveFile, files_where
from lakehouse.predicates import one_of
from lakehouse.queries import among, empty_sql, files_sql, quote

FEW = 200
"""pyiceberg compares no more values than this with a file's bounds (its IN_PREDICATE_LIMIT); 31,000 take it 0.5 s a table."""


@dataclass(frozen=True)
class _Buckets:
    """The partition field of a table's present spec that is a bucket of a column: its place, and the buckets of the values."""

    spec_id: int
    place: int
    of_values: pa.Array

    def of_file(self, file: DataFile) -> int | None:
        """The bucket that a file lies in; None if it was written under another spec."""
        return int(file.partition[self.place]) if file.spec_id == self.spec_id else None


def files_with(table: Table, column: str, values: pa.ChunkedArray, snapshot_id: int | None = CURRENT) -> list[LiveFile]:
    """The files of a snapshot that may hold rows in which `column` is one of `values`; see `files_where`."""
    few = pc.unique(values).drop_null()
    if len(few) <= FEW:
        return files_where(table, one_of(column, few.to_pylist()), snapshot_id)
    files, buckets = files_where(table, None, snapshot_id), _buckets(table, column, few)
    if buckets is None:
        return files
    wanted = {None, *pc.unique(buckets.of_values).to_pylist()}
    return [f for f in files if buckets.of_file(f) in wanted]


def holding_sql(table: Table, snapshot_id: int | None, column: str, values: pa.ChunkedArray) -> str:
    """Rows of a snapshot as an SQL table expression: all in which `column` is one of `values`, and perhaps others."""
    files = files_with(table, column, values, snapshot_id)
    return among_sql(table, files, column, values) if files else empty_sql(table)


def among_sql(table: Table, files: Sequence[DataFile], column: str, values: pa.ChunkedArray, *, numbered: bool = False) -> str:
    """Rows of `files` as `files_sql` gives them: all in which `column` is one of `values`, and perhaps others.

    Sorted by the column, each file has a row group in which any value might lie. Of 20 values in 16 buckets each file asked for
    all 20 reads eight times as much as asked for those of its bucket.
    """
    few = pc.unique(values).drop_null()
    buckets = _buckets(table, column, few)
    if buckets is None:
        return _asked(table, files, column, few, numbered=numbered)
    parts: dict[int | None, list[DataFile]] = {}
    for file in files:
        parts.setdefault(buckets.of_file(file), []).append(file)
    chosen = {b: few if b is None else few.filter(pc.equal(buckets.of_values, b)) for b in parts}
    asked = (_asked(table, held, column, chosen[b], numbered=numbered) for b, held in parts.items())
    return "(" + " UNION ALL ".join(f"FROM {rows}" for rows in asked) + ")"


def _asked(table: Table, files: Iterable[DataFile], column: str, values: pa.Array, *, numbered: bool) -> str:
    return f"(FROM {files_sql(table, files, numbered=numbered)} WHERE {among(quote(column), pa.chunked_array([values]))})"


def _buckets(table: Table, column: str, values: pa.Array) -> _Buckets | None:
    spec, schema = table.spec(), table.schema()
    for place, field in enumerate(spec.fields):
        source = schema.find_field(field.source_id)
        if source.name == column and isinstance(field.transform, BucketTransform):
            of_values = field.transform.pyarrow_transform(source.field_type)(values)
            return _Buckets(spec.spec_id, place, of_values)
    return None
