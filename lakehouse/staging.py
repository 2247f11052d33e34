"""Staging: rows become sorted Parquet files before any commit, once; a conflict commits the same files again."""

from __future__ import annotations

import itertools
import uuid

import pyarrow as pa
from pyiceberg.io.pyarrow import _dataframe_to_data_files, schema_to_pyarrow
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from lakehouse.declarations import Declaration
from lakehouse.errors import ChecksFailed, Terminal
from lakehouse.outages import reaching


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
    # whether a required field holds NULL is for `stage` to say: transforms conform rows that they only pass on
    return pa.table(columns, schema=pa.schema([f.with_nullable(True) for f in schema]))


def stage(table: Table, declared: Declaration, rows: pa.Table) -> list[DataFile]:
    """Write `rows`, sorted by the declared order, as Parquet files of the table, one or more for each partition touched.

    Nothing is published: the files belong to no snapshot until a commit names them.

    Raises:
        ChecksFailed: a required column holds NULL: Parquet cannot hold that, so it cannot wait for `check_staged`.
        Retryable: the object store failed. Terminal: it refuses; and see `conform`.
    """
    rows = conform(table, rows)
    if rows.num_rows == 0:
        return []
    required = [f.name for f in table.schema().fields if f.required]
    if missing := [f"not_null({c}): {n} rows" for c in required if (n := rows.column(c).null_count)]:
        raise ChecksFailed(
            f"{declared.table}: the batch was held, nothing was committed: {'; '.join(missing)}. Rules: {declared.path}"
        )
    if declared.sort:
        rows = rows.sort_by([(c, "ascending") for c in declared.sort])
    # pyiceberg 0.12 offers writing without committing under this private name alone; test_contract.py pins it.
    with reaching(f"{declared.table}: writing data files to {table.location()}"):
        files = list(_dataframe_to_data_files(table.metadata, rows, table.io, uuid.uuid4(), itertools.count()))
    for file in files:
        file.spec_id = table.spec().spec_id  # known to readers of manifests, not yet to a file just written
    return files
